"""A run folder written by commit b6f3d3e still answers what is asked of a run.

`tests/support/files/run_b6f3d3e` is what that commit made of `configs/quickstart.yaml` with LoRA
r=2 on q_proj and v_proj, 3 rounds and 4 clients, but for the picture of its curves. It is not to be
made anew: people have such folders.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from fedclip import models
from tests.conftest import Command

KEPT = Path(__file__).parents[1] / "support" / "files" / "run_b6f3d3e"
SUMMARY = json.loads((KEPT / "summary.json").read_text(encoding="utf-8"))
# What `evaluate` says, where the test images can no longer be told.
REFUSED: str | None = "chose test and validation images by another rule"

# Image of scikit-learn's digits: label and confidence, as that commit's `predict` had them.
PREDICTED = {
    0: ("zero", 0.998455286026001),
    170: ("eight", 0.854442298412323),
    340: ("two", 0.9961626529693604),
    850: ("five", 0.9943903088569641),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(KEPT, tmp_path / "run"))


def test_info(fedclip: Command, run: Path) -> None:
    code, out, err = fedclip("info", run, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["summary"] == SUMMARY
    counted = ("base_parameters", "total_parameters", "trainable_parameters")
    assert {key: facts[key] for key in counted} == {key: SUMMARY[key] for key in counted}


def test_evaluate(fedclip: Command, run: Path) -> None:
    code, out, err = fedclip("evaluate", run, "--json")
    if REFUSED is not None:
        assert code == 2
        assert REFUSED in err
        return
    assert code == 0, err
    figures = json.loads(out)
    one_image = 1 / figures["test_examples"]  # other processors round otherwise
    assert figures["accuracy"] == pytest.approx(SUMMARY["accuracy"], abs=1.01 * one_image)
    assert figures["zero_shot_accuracy"] == SUMMARY["zero_shot_accuracy"]


def test_resume(fedclip: Command, run: Path) -> None:
    """It was split by another rule, and its checkpoint does not say what it belongs to."""
    (run / "summary.json").unlink()
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    code, _, err = fedclip("run", "--resume", run)
    assert code == 2
    assert "the run was begun by another version of fedclip" in err
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_predict(fedclip: Command, run: Path, tmp_path: Path) -> None:
    files = []
    for index in PREDICTED:
        files.append(tmp_path / f"{index}.png")
        grey = (load_digits().images[index] * 255 / 16).astype(np.uint8)
        Image.fromarray(grey).save(files[-1])
    code, out, err = fedclip("predict", run, *files, "--json")
    assert code == 0, err
    for found, (label, confidence) in zip(json.loads(out), PREDICTED.values(), strict=True):
        assert found["label"] == label
        assert found["confidence"] == pytest.approx(confidence, abs=1e-4)


@pytest.mark.parametrize("adapter", ["", "adapter_best"])
def test_export(fedclip: Command, run: Path, tmp_path: Path, adapter: str) -> None:
    code, _, err = fedclip("export", run / adapter, "--to", "peft", "--output", tmp_path / "peft")
    assert code == 0, err
    ours = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    theirs = load_file(run / (adapter or "adapter") / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())


def test_export_merged(fedclip: Command, run: Path, tmp_path: Path) -> None:
    """The exported weights are the base's plus 2 B A, scaling being alpha 4 over rank 2."""
    code, _, err = fedclip("export", run, "--to", "merged", "--output", tmp_path / "merged")
    assert code == 0, err
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(Path(models.__file__).parent / "tiny" / "model.safetensors")
    factors = load_file(run / "adapter" / "adapter_model.safetensors")
    layer = "vision_model.encoder.layers.0.self_attn.q_proj"
    (down,) = (t for name, t in factors.items() if f"{layer}.lora_A" in name)
    (up,) = (t for name, t in factors.items() if f"{layer}.lora_B" in name)
    change = merged[f"{layer}.weight"] - base[f"{layer}.weight"]
    assert (change - 2 * up @ down).abs().max() < 1e-6
    assert change.abs().max() > 1e-3
