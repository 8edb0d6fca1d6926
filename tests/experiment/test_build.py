"""What a run refuses or settles before it starts, and what an inspection refuses afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import fedclip
from fedclip.adapters import inspect as inspection
from fedclip.catalog import strategy_row
from fedclip.config.loading import config_from_dict
from fedclip.errors import UsageError
from fedclip.experiment.build import build
from fedclip.experiment.run import resume
from fedclip.experiment.strategy import setting_of
from fedclip.federated.engines.sharded import Processes
from fedclip.models.clip import create_clip_model
from fedclip.models.pretrained import base_folder
from fedclip.reports.listener import Listener
from tests.support.runs import StopAfter
from tests.support.small import SMALL

SMALL = {
    "model": {"model_name": SMALL, "lora": {"r": 2}},
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


def test_personal_models_need_test_examples_of_their_own(tmp_path: Path) -> None:
    config = small(federation={"strategy": "local"}, data={"shots": 4})
    with pytest.raises(UsageError, match=r"no client has any; .* leave out data\.shots"):
        fedclip.run(config, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_rate_for_nothing_that_trains(tmp_path: Path) -> None:
    config = small(optimizer={"rate_pattern": {"lora_B": 4, "fc1": 2}})
    with pytest.raises(UsageError, match=r"optimizer\.rate_pattern: nothing fits .*'fc1'"):
        fedclip.run(config, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_dora_runs_one_by_one_and_is_evaluated_again(tmp_path: Path) -> None:
    class Notes(Listener):
        messages: ClassVar[list[str]] = []

        def message(self, text: str) -> None:
            self.messages.append(text)

    lora = {"r": 2, "use_dora": True, "rank_pattern": {"q_proj": 3}}
    config = small(
        model={"lora": lora}, client={"learning_rate": 0.02}, optimizer={"rate_pattern": {".*": 2}}
    )
    run = fedclip.run(config, output=tmp_path / "run", listener=Notes())
    assert "DoRA is not stacked: it runs on the sequential engine" in Notes.messages
    assert "name: sequential" in (tmp_path / "run" / "config.yaml").read_text()
    assert inspection.evaluate(run.folder)["accuracy"] == run.summary["accuracy"]
    state = load_file(run.adapter / "adapter_model.safetensors")
    fresh = create_clip_model(config["model"], class_names=list("0123456789")).get_parameters()
    moved = [n for n in state if "magnitude" in n and not torch.equal(state[n], fresh[n])]
    assert len(moved) == 16
    assert inspection.load_run_model(run.folder).get_lora_info()["use_dora"] is True


def test_a_layerwise_run_keeps_its_patterns(tmp_path: Path) -> None:
    lora = {"r": 2, "rank_pattern": {r"layers\.[01]\..*": 1}, "exclude_modules": ["k_proj"]}
    run = fedclip.run(small(model={"lora": lora}), output=tmp_path / "run")
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["lora"]
    assert kept["rank_pattern"] == lora["rank_pattern"]
    assert inspection.evaluate(run.folder)["accuracy"] == run.summary["accuracy"]
    ranks = inspection.load_run_model(run.folder).get_lora_info()["ranks"]
    assert sorted(ranks.values()) == [1] * 6 + [2] * 6


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
    assert inspection.info(path)["trainable_parameters"] == 2 * 64 * 4 * 4
    with pytest.raises(UsageError, match=r"data\.path"):
        inspection.info(path, ["model.head=linear"])
    facts = inspection.info(path, ["model.head=linear", "model.num_classes=3"])
    assert facts["head_parameters"] == 3 * 16 + 3
    facts = inspection.info(path, ["model.head=linear", "data.class_names=[a,b]"])
    assert facts["head_parameters"] == 2 * 16 + 2


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


def test_an_adapter_with_scales_of_its_own_brings_them_along(tmp_path: Path) -> None:
    model = create_clip_model(SMALL["model"], class_names=["a"])
    model.save_adapter(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"alpha_pattern": {"q_proj": 1}}))
    (tmp_path / "adapter" / "fedclip.json").unlink()  # whose digests would tell of the edit
    model.load_adapter(tmp_path / "adapter")
    alphas = model.get_lora_info()["alphas"]
    assert {alpha for name, alpha in alphas.items() if name.endswith("q_proj")} == {1}
    assert {alpha for name, alpha in alphas.items() if not name.endswith("q_proj")} == {4}


def test_the_least_rank_must_fit_the_layers_as_they_are(tmp_path: Path) -> None:
    """All 16 layers have rank 2: a budget of 0.6 is 19.2 ranks, and a minimum of 2 takes 32."""
    plan = {"enabled": True, "minimum": 2}
    lora = {"r": 8, "rank_pattern": {"vision_encoder": 2}}
    with pytest.raises(UsageError, match=r"budget: 0\.6 .* 32 by .*rank_pattern.* 32;"):
        fedclip.run(
            small(model={"lora": lora}, federation={"strategy": "fedit", "dynamic_ranks": plan}),
            output=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()
    # A layer that cannot have the minimum has what it can, and needs no more of the budget.
    lora["rank_pattern"] = {"q_proj": 1, "v_proj|k_proj|out_proj": 12}
    plan |= {"minimum": 6, "budget": 0.55}  # 4 * 1 + 12 * 6 = 76 of 0.55 * (4 + 144) = 81.4
    fedclip.run(
        small(model={"lora": lora}, federation={"strategy": "fedit", "dynamic_ranks": plan}),
        output=tmp_path / "run",
    )


def test_ranks_by_memory_are_measured_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = {"strategy": "flexlora", "rounds": 2, "client_memory_mb": {"default": 1000}}
    config = small(federation=federation)
    with pytest.raises(KeyboardInterrupt):
        fedclip.run(config, output=tmp_path / "run", listener=StopAfter(1))
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["federation"]
    assert kept["client_ranks"] == {"client-00": 2, "client-01": 2}
    assert kept["client_memory_mb"] is None

    def measured(*args: object, **kw: object) -> int:
        raise AssertionError("measured again")

    monkeypatch.setattr("fedclip.experiment.strategy.activation_bytes", measured)
    resume(tmp_path / "run")


def test_all_processes_take_the_ranks_that_the_first_found(tmp_path: Path) -> None:
    class Second(Processes):  # type: ignore[misc]
        def first_numbers(self, numbers: Sequence[int]) -> list[int]:
            return [1] * len(numbers)

    federation = {"strategy": "flexlora", "client_memory_mb": {"default": 1000}}
    config = config_from_dict(small(federation=federation, engine={"name": "sequential"}))
    ranks = setting_of(build(config, Listener(), Second()), strategy_row("flexlora")).ranks
    assert set(ranks.values()) == {1}
