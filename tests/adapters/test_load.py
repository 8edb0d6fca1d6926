"""predict and serve on what a site or a colleague has: adapters apart from their run, exports."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fedclip as package
from fedclip.adapters.export import export
from fedclip.adapters.inspect import load_run_model
from fedclip.adapters.predict import Predictor, predict
from fedclip.errors import UsageError
from tests.conftest import Command

TINY = {
    "model": {"model_name": "tiny", "lora": {"r": 2, "lora_alpha": 4}},
    "data": {"name": "digits", "max_train_examples": 48},
    "federation": {"num_clients": 3, "rounds": 1},
    "client": {"learning_rate": 5e-3},
    "evaluation": {"max_examples": 5},
    "device": "cpu",
}
KINDS = {
    "lora": {},
    "linear": {"head": "linear"},
    "head alone": {"head": "linear", "lora": {"enabled": True, "target_modules": {}}},
    "full": {"lora": {"enabled": False}},
    "dora": {"lora": {"r": 2, "lora_alpha": 4, "use_dora": True}},
}


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = {**TINY["model"], **KINDS[request.param]}
    folder = tmp_path_factory.mktemp("run") / "run"
    package.run(package.Config.model_validate({**TINY, "model": model}), output=folder)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def same(found, expected) -> None:
    assert found[0]["label"] == expected[0]["label"]
    assert found[0]["scores"] == pytest.approx(expected[0]["scores"], abs=1e-4)


def test_a_copied_adapter_predicts_what_its_run_predicts(
    run: Path, image: Path, tmp_path: Path
) -> None:
    expected = predict(run, [image])
    copied = shutil.copytree(run / "adapter", tmp_path / "from-a-colleague")
    same(predict(copied, [image]), expected)
    same(predict(run / "adapter", [image]), expected)


def test_an_exported_model_predicts_what_its_run_predicts(
    run: Path, image: Path, tmp_path: Path
) -> None:
    expected = predict(run, [image])
    export(run, "merged", tmp_path / "merged")
    same(predict(tmp_path / "merged", [image]), expected)
    if load_run_model(run).kind.peft_format:
        export(run, "peft", tmp_path / "peft")
        same(predict(tmp_path / "peft", [image]), expected)


def test_other_labels_for_a_copied_adapter(run: Path, image: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run / "adapter", tmp_path / "copied")
    if load_run_model(copied).head == "linear":
        with pytest.raises(UsageError, match="linear head"):
            Predictor.of_run(copied, ["a cat", "a dog"])
        return
    assert predict(copied, [image], ["a cat", "a dog"])[0]["scores"].keys() == {"a cat", "a dog"}


def test_what_holds_no_model_is_named(
    fedclip: Command, finished_run: Path, image: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "onnx").mkdir()
    classes = '{"head": "text", "class_names": ["a"], "templates": ["{}"]}'
    (tmp_path / "onnx" / "classes.json").write_text(classes)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "classes.json").write_text('{"head": 3}')
    for name, words in {
        "empty": "is no run, adapter or exported model: it has no config.yaml",
        "nowhere": "it does not exist",
        "onnx": "holds towers for other programs",
        "odd": "classes.json is damaged: head",
    }.items():
        code, _, err = fedclip("predict", tmp_path / name, image)
        assert (code, words in " ".join(err.split())) == (2, True), err
    for command in ("evaluate", "card"):
        code, _, err = fedclip(command, finished_run / "adapter")
        assert code == 2
        assert "is an adapter of the run" in " ".join(err.split())


def test_an_adapter_of_other_weights_is_refused(run: Path, image: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run / "adapter", tmp_path / "copied")
    notes = copied / "fedclip.json"
    notes.write_text(notes.read_text().replace('"tiny"', '"random:tiny"'))
    with pytest.raises(UsageError):
        predict(copied, [image])
