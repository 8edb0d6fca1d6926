"""Exported models: transformers and onnxruntime see what fedclip sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPModel, pipeline

import fedclip as package
from fedclip.adapters import inspect as inspection
from fedclip.adapters.export import export
from fedclip.errors import FedclipError, UsageError
from fedclip.models.clip import CLIPLoRAWrapper, create_clip_model
from fedclip.models.export import onnx as onnx_files
from tests.conftest import Command
from tests.support.models import BOTH, FULL, NAMES, shaken, some_pixels
from tests.support.runs import with_

VISION = {"vision_encoder": ["q_proj", "fc2"]}
Make = Callable[..., tuple[Path, CLIPLoRAWrapper]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """An adapter folder, and the model that it was saved from."""

    def make(config: dict[str, Any], **how: Any) -> tuple[Path, CLIPLoRAWrapper]:
        model = create_clip_model(config, **({"class_names": NAMES} | how))
        model.set_parameters(shaken(model))
        model.save_adapter(tmp_path / "adapter")
        return tmp_path / "adapter", model

    return make


@pytest.fixture
def image() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    return Image.fromarray(noise)


@torch.no_grad()
def logits(model: CLIPLoRAWrapper) -> torch.Tensor:
    return model(some_pixels())


@pytest.mark.parametrize("config", [{"lora": {"r": 4, "target_modules": BOTH}}, FULL])
def test_a_pipeline_predicts_what_fedclip_predicts(
    tmp_path: Path, make: Make, image: Image.Image, config: dict[str, Any]
) -> None:
    folder, model = make(config, templates=["this is a {}"])
    facts = export(folder, "merged")
    assert facts["output"] == str(tmp_path / "adapter-merged")
    classify = pipeline("zero-shot-image-classification", model=facts["output"], device="cpu")
    found = classify(image, candidate_labels=NAMES, hypothesis_template="this is a {}")
    with torch.no_grad():
        scores = model(torch.from_numpy(model.to_pixels([image]))).softmax(dim=-1)[0]
    expected = dict(zip(NAMES, scores.tolist(), strict=True))
    assert {row["label"]: row["score"] for row in found} == pytest.approx(expected, abs=1e-5)
    about = json.loads((Path(facts["output"]) / "classes.json").read_text())
    assert about["prompts"] == [f"this is a {name}" for name in NAMES]
    assert about["logit_scale"] == pytest.approx(model.clip.logit_scale.exp().item())


def test_a_merged_folder_has_everything_that_a_base_needs(tmp_path: Path, make: Make) -> None:
    folder, model = make({"lora": {"target_modules": BOTH}})
    out = Path(export(folder, "merged", tmp_path / "out")["output"])
    again = create_clip_model({"model_name": str(out), **FULL}, class_names=NAMES)
    expected = logits(model)
    assert (logits(again) - expected).abs().max() <= 1e-5 * expected.abs().max()
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    export(folder, "merged", out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_trained_head_comes_along(tmp_path: Path, make: Make) -> None:
    folder, model = make({"head": "linear", "lora": {"target_modules": VISION}})
    out = Path(export(folder, "merged", tmp_path / "out")["output"])
    clip, head = CLIPModel.from_pretrained(out), load_file(out / "head.safetensors")
    with torch.no_grad():
        pixels = model.normalised(some_pixels())
        embedded = clip.visual_projection(clip.vision_model(pixels).pooler_output)
        found = embedded @ head["head.weight"].T + head["head.bias"]
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)


def test_runs_are_exported_in_every_form(fedclip: Command, tmp_path: Path) -> None:
    run = package.run(
        with_(model={"model_name": "random:tiny"}, federation={"rounds": 1}),
        output=tmp_path / "run",
    )
    code, out, _ = fedclip("export", run.folder, "--to", "peft", "--output", tmp_path / "peft")
    assert code == 0
    assert str(tmp_path / "peft") in out
    for file in run.adapter.iterdir():
        assert (tmp_path / "peft" / file.name).read_bytes() == file.read_bytes()

    assert fedclip("export", run.folder, "--to", "merged", "--json")[0] == 0
    model = inspection.load_run_model(run.folder)
    base = {"model_name": str(tmp_path / "run-merged"), **FULL}
    again = create_clip_model(base, class_names=model.class_names, templates=model.templates)
    expected = logits(model)
    assert (logits(again) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_cannot_be_exported(fedclip: Command, tmp_path: Path, make: Make) -> None:
    folder, _ = make(FULL)
    with pytest.raises(UsageError, match="holds a full model, no PEFT adapter; use --to merged"):
        export(folder, "peft")
    with pytest.raises(UsageError, match=r"--to must be one of peft, merged, onnx, got 'gguf'"):
        export(folder, "gguf")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").touch()
    with pytest.raises(UsageError, match=r"holds other files \(mine\.txt\)"):
        export(folder, "merged", tmp_path / "taken")
    code, _, err = fedclip("export", tmp_path / "none", "--to", "merged")
    assert code == 2
    assert "none holds no adapter" in err
    folder, _ = make({"lora": {"r": 2}})
    with pytest.raises(UsageError, match="is the adapter folder itself"):
        export(folder, "peft", folder)


def test_random_weights_have_no_tokenizer_to_hand_on(tmp_path: Path, make: Make) -> None:
    config = json.loads((package.base_folder("tiny") / "config.json").read_text())
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps(config))
    folder, _ = make({"model_name": f"random:{tmp_path / 'shape'}", "lora": {"r": 2}})
    for form in ("merged", "onnx"):
        with pytest.raises(UsageError, match="random weights and no tokenizer of its own"):
            export(folder, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- ONNX ---


def test_onnx_says_what_to_install(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make({"lora": {"r": 2}})
    monkeypatch.setattr(onnx_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs onnx and onnxruntime; install .*\[onnx\]"):
        export(folder, "onnx")


@pytest.mark.parametrize("head", ["text", "linear"])
def test_onnx_towers_are_fedclips(tmp_path: Path, make: Make, head: str) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="ONNX is the extra 'onnx'")
    pytest.importorskip("onnx", reason="ONNX is the extra 'onnx'")
    targets = BOTH if head == "text" else VISION
    templates = ["a {}", "one small {}."]
    folder, model = make(
        {"head": head, "lora": {"r": 4, "target_modules": targets}}, templates=templates
    )
    out = Path(export(folder, "onnx", tmp_path / "out")["output"])
    about = json.loads((out / "classes.json").read_text())
    images, texts = (
        runtime.InferenceSession(str(out / name), providers=["CPUExecutionProvider"])
        for name in ("image_encoder.onnx", "text_encoder.onnx")
    )
    pixels = model.normalised(some_pixels()).numpy()
    for count in (1, 4):  # any batch
        found = images.run(None, {"pixel_values": pixels[:count]})
        with torch.no_grad():
            expected = model.encode_images(some_pixels()[:count])
        np.testing.assert_allclose(found[0], expected, atol=1e-5)
        if head == "linear":
            np.testing.assert_allclose(found[1], logits(model)[:count], atol=1e-4)
    # Class features from the file's ids, and from its tokenizer with padding.
    tokens = AutoTokenizer.from_pretrained(out)(about["prompts"], padding=True)["input_ids"]
    longer = np.pad(np.array(tokens), ((0, 0), (0, 3)), constant_values=tokens[0][-1])
    for ids in (np.array(about["input_ids"]), longer):
        (embeds,) = texts.run(None, {"input_ids": ids})
        classes = embeds.reshape(len(NAMES), len(templates), -1).mean(axis=1)
        classes /= np.linalg.norm(classes, axis=1, keepdims=True)
        with torch.no_grad():
            np.testing.assert_allclose(classes, model.text_features(), atol=1e-5)
    if head == "text":
        (embeds,) = images.run(["image_embeds"], {"pixel_values": pixels})
        found = about["logit_scale"] * embeds @ classes.T
        np.testing.assert_allclose(found, logits(model), rtol=1e-4, atol=1e-4)


def test_a_graph_that_computes_something_else_is_not_written(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX is the extra 'onnx'")
    pytest.importorskip("onnx", reason="ONNX is the extra 'onnx'")
    folder, model = make({"lora": {"r": 2}})
    write = onnx_files._write_graph

    def write_wrongly(encoder: torch.nn.Module, *how: Any) -> None:
        class Wrong(type(encoder)):
            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return (super().forward(x)[0] * 1.001,)

        write(Wrong(model).eval(), *how)

    monkeypatch.setattr(onnx_files, "_write_graph", write_wrongly)
    with pytest.raises(FedclipError, match=r"image_encoder\.onnx: onnxruntime and torch differ by"):
        export(folder, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
