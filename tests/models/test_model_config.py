"""A model folder of a stranger: it describes numbers, and chooses no code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from fedclip import base_folder, create_clip_model
from fedclip.errors import UsageError
from fedclip.models.pretrained import load_tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_folder("tiny"), tmp_path / "base"))


def edit(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def model_of(folder: Path) -> Any:
    return create_clip_model({"model_name": str(folder)}, class_names=["a", "b"])


SQUARE = {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"do_center_crop": False}, "do_center_crop is false"),
        ({"do_resize": False}, "do_resize is false"),
        (
            {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
            "crop_size is .*64",
        ),
        ({"size": {"shortest_edge": 16}}, "partly black"),
        ({"resample": None}, "resample is None"),
        ({"resample": 9}, "resample is 9"),
        ({"size": {"longest_edge": 32}}, "partly black"),
        ({"crop_size": {"height": 32, "width": 16}}, "crop_size is"),
        ({"do_center_crop": False, "size": {"height": 32, "width": 16}}, "do_center_crop is false"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"rescale_factor": -1.0}, "rescale_factor"),
        ({"size": "large"}, "cannot load"),
    ],
)
def test_preprocessing_that_does_not_fit_is_named(
    folder: Path, change: dict[str, Any], says: str
) -> None:
    edit(folder / "preprocessor_config.json", change)
    with pytest.raises(UsageError, match=says) as caught:
        model_of(folder)
    assert "preprocessor_config.json" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"shortest_edge": 40}},
        {"do_center_crop": False, "size": SQUARE},
        {"do_center_crop": True, "size": {"height": 36, "width": 36}},
        {"do_normalize": False},
        {"resample": 0},
    ],
)
def test_other_preprocessing_that_fits_is_used(folder: Path, change: dict[str, Any]) -> None:
    edit(folder / "preprocessor_config.json", change)
    draw, model = np.random.default_rng(0), model_of(folder)
    library = CLIPImageProcessorPil.from_pretrained(folder)
    for height, width in ((40, 60), (61, 33), (32, 32), (7, 9), (1, 5), (300, 201)):
        image = Image.fromarray(draw.integers(0, 255, (height, width, 3), np.uint8))
        pixels = model.to_pixels([image])
        theirs = library(image, do_rescale=False, do_normalize=False)["pixel_values"]
        np.testing.assert_array_equal(pixels, np.stack(theirs))
        assert pixels.shape == (1, 3, 32, 32)
        assert (pixels != 0).mean() > 0.9


@pytest.mark.parametrize("place", ["", "text_config", "vision_config"])
def test_no_field_chooses_code_or_numbers(folder: Path, place: str) -> None:
    """The attention implementation above all, and the type of numbers."""
    chosen = {
        "_attn_implementation": "flash_attention_2",
        "attn_implementation": "eager",
        "_experts_implementation": "x",
        "torch_dtype": "float16",
        "dtype": "float16",
        "attention_dropout": 0.5,
        "use_cache": "x",
        "chunk_size_feed_forward": 3,
        "output_attentions": True,
    }
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", {place: config[place] | chosen} if place else chosen)
    ours, plain = model_of(folder), create_clip_model({"model_name": "tiny"}, class_names=["a"])
    assert ours.clip.config._attn_implementation == plain.clip.config._attn_implementation
    pixels = np.random.default_rng(1).integers(0, 255, (2, 3, 32, 32), np.uint8)
    import torch

    given = torch.from_numpy(pixels)
    assert torch.equal(ours.encode_images(given), plain.encode_images(given))
    assert ours.clip.dtype == torch.float32


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "asks for auto_map"),
        ("config.json", {"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["e.T", None]}}, "auto_map"),
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer"}, "tokenizer_class must be"),
        ("config.json", {"vision_config": {"image_size": [32, 32]}}, "image_size must be"),
        ("config.json", {"vision_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers must"),
        ("config.json", {"text_config": {"hidden_act": "os.system"}}, "hidden_act must be one of"),
        ("config.json", {"text_config": {"layer_norm_eps": "x"}}, "layer_norm_eps must be"),
        ("config.json", {"text_config": [1]}, "text_config must be an object"),
        ("config.json", {"logit_scale_init_value": 1e308}, "logit_scale_init_value must be"),
        ("config.json", {"model_type": ["clip"]}, "fine-tunes CLIP"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    folder: Path, file: str, change: dict[str, Any], says: str
) -> None:
    edit(folder / file, change)
    with pytest.raises(UsageError, match=says):
        model_of(folder)


@pytest.mark.parametrize("length", ["12", [1], {}, 1e400, -5])
def test_a_tokenizers_own_idea_of_length_decides_nothing(folder: Path, length: Any) -> None:
    edit(folder / "tokenizer_config.json", {"model_max_length": length})
    texts = ["a cat", "a cat " * 30]
    assert load_tokens(str(folder)).encode(texts) == load_tokens("tiny").encode(texts)


@pytest.mark.parametrize(
    "file", ["config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json"]
)
@pytest.mark.parametrize("text", [b"[" * 100000, b"[]", b"\xff", b"", b"5", b'"x"', b"null"])
def test_damaged_files_are_refused(folder: Path, file: str, text: bytes) -> None:
    (folder / file).write_bytes(text)
    said = "model.model_name"
    try:
        model_of(folder)
    except UsageError as error:
        said = str(error)
    else:  # an empty file of settings means CLIP's defaults, which are what stands in the folder
        assert file != "config.json"
    assert "model.model_name" in said


@pytest.mark.parametrize("change", [lambda b: b[:1000], lambda b: b"", lambda b: b"x" * 50])
def test_damaged_weights_are_refused(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UsageError, match="cannot load"):
        model_of(folder)


def test_an_adapter_beside_a_model_is_refused(folder: Path, tmp_path: Path) -> None:
    """The library would put it into the base without a word."""
    model_of(folder).save_adapter(tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, folder)
    with pytest.raises(UsageError, match="adapter"):
        model_of(folder)
