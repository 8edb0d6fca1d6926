"""What a run refuses or settles before it starts, and what an inspection refuses afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import fedclip
from fedclip import inspection
from fedclip.config_io import config_from_dict
from fedclip.errors import UsageError
from fedclip.models.base import base_folder
from fedclip.models.clip import create_clip_model

SMALL = {
    "model": {"model_name": "random:tiny", "lora": {"r": 2}},
    "data": {"name": "digits", "max_train_examples": 60},
    "federation": {"rounds": 1, "num_clients": 2},
}


def small(**sections: dict[str, object]) -> dict[str, object]:
    """SMALL with keys of some sections replaced."""
    return {**SMALL, **{k: SMALL.get(k, {}) | keys for k, keys in sections.items()}}  # type: ignore


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of noise."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(15):
            noise = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def test_keep_best_needs_validation_examples(tmp_path: Path) -> None:
    config = small(evaluation={"keep_best": True}, data={"validation_fraction": 0.0})
    with pytest.raises(UsageError, match=r"evaluation\.keep_best.*data\.validation_fraction"):
        fedclip.run(config, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_refuses_data_that_has_changed(tmp_path: Path, pictures: Path) -> None:
    config = small(data={"name": "imagefolder", "path": str(pictures), "max_train_examples": None})
    run = fedclip.run(config, output=tmp_path / "run")
    assert inspection.evaluate(run.folder)["accuracy"] == run.summary["accuracy"]
    next((pictures / "cat").iterdir()).unlink()
    with pytest.raises(UsageError, match=r"partition\.json.*changed"):
        inspection.evaluate(run.folder)


def test_dropout_of_the_base_model_itself_is_off(tmp_path: Path) -> None:
    """Its masks would come from the global generator: no two runs would agree."""
    folder = tmp_path / "model"
    shutil.copytree(base_folder("tiny"), folder)
    config = json.loads((folder / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        config[tower]["attention_dropout"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    runs = [
        fedclip.run(small(model={"model_name": str(folder)}), output=tmp_path / f"run{i}")
        for i in range(2)
    ]
    assert runs[0].summary["adapter_sha256"] == runs[1].summary["adapter_sha256"]


def test_info_without_the_data_counts_what_it_can(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    data = {"name": "imagefolder", "path": str(tmp_path / "absent")}
    path.write_text(yaml.safe_dump({"model": SMALL["model"], "data": data}))
    assert inspection.info(path)["trainable_parameters"] == 2 * 256 * 4 * 4
    with pytest.raises(UsageError, match=r"data\.path"):
        inspection.info(path, ["model.head=linear"])
    facts = inspection.info(path, ["model.head=linear", "model.num_classes=3"])
    assert facts["head_parameters"] == 3 * 128 + 3
    facts = inspection.info(path, ["model.head=linear", "data.class_names=[a,b]"])
    assert facts["head_parameters"] == 2 * 128 + 2


def test_numbers_that_another_yaml_reader_left_as_text() -> None:
    values = yaml.safe_load("optimizer: {learning_rate: 1e-4}\ndata: {class_names: ['1e4', b]}")
    assert values["optimizer"]["learning_rate"] == "1e-4"
    config = config_from_dict(values)
    assert config.client.learning_rate == 1e-4
    assert config.data.class_names == ("1e4", "b")


@pytest.mark.parametrize("template", ["no place", "{} and {}", "{name}"])
def test_a_template_has_one_place_for_the_name(template: str) -> None:
    with pytest.raises(UsageError, match=r"data\.templates"):
        config_from_dict({"data": {"templates": [template]}})


def test_an_adapter_with_scales_of_its_own_is_refused(tmp_path: Path) -> None:
    model = create_clip_model(SMALL["model"], class_names=["a"])
    model.save_adapter(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"alpha_pattern": {"q_proj": 1}}))
    with pytest.raises(UsageError, match="alpha_pattern"):
        model.load_adapter(tmp_path / "adapter")
