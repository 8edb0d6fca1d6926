"""The wrapper: heads, full fine-tuning, zero-shot."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedclip.errors import FedclipWarning, UsageError
from fedclip.models.clip import CLIPLoRAWrapper, adapter_sha256, create_clip_model
from fedclip.models.pretrained import load_base
from tests.support.models import BOTH, FULL, NAMES, shaken, some_pixels


@pytest.fixture
def model() -> CLIPLoRAWrapper:
    return create_clip_model({"lora": {"r": 4}}, class_names=NAMES)


@pytest.fixture
def pixels() -> torch.Tensor:
    return some_pixels()


# --- heads ---


def test_class_names_make_a_text_head(model: CLIPLoRAWrapper, pixels: torch.Tensor) -> None:
    assert (model.head, model.class_names) == ("text", tuple(NAMES))
    images, texts = model.encode_images(pixels), model.text_features()
    expected = model.clip.logit_scale.exp() * images @ texts.T
    torch.testing.assert_close(model(pixels), expected)


def test_a_number_of_classes_makes_a_linear_head(pixels: torch.Tensor) -> None:
    model = create_clip_model({"num_classes": 5}, seed=3)
    assert model.head == "linear"
    assert model(pixels).shape == (4, 5)
    state = model.get_parameters()
    assert state["head.weight"].shape == (5, 128)
    assert not state["head.bias"].any()
    again = create_clip_model({"num_classes": 5}, seed=3).get_parameters()
    assert torch.equal(state["head.weight"], again["head.weight"])
    summary = model.get_model_summary()
    assert summary["head_parameters"] == 5 * 128 + 5
    assert summary["trainable_parameters"] == 32768 + 645
    assert summary["total_parameters"] == summary["base_parameters"] + 32768 + 645
    assert model.get_lora_info()["trainable_parameters"] == 32768


def test_head_may_be_chosen() -> None:
    assert create_clip_model({"head": "linear"}, class_names=NAMES).classifier.out_features == 3
    text = create_clip_model({"head": "text", "num_classes": 3})
    assert (text.head, text.classifier) == ("text", None)
    text.set_classes(NAMES)
    assert text.text_features().shape == (3, 128)


def test_numpys_numbers_are_numbers() -> None:
    config = {"num_classes": np.int64(3), "lora": {"r": np.int32(2), "lora_alpha": np.float32(4)}}
    model = create_clip_model(config)
    assert model.get_parameters()["head.weight"].shape == (3, 128)
    assert model.get_lora_info()["r"] == 2


def test_numbers_that_contradict_each_other() -> None:
    with pytest.raises(UsageError, match="num_classes is 4, but there are 3 class names"):
        create_clip_model({"num_classes": 4}, class_names=NAMES)
    model = create_clip_model({"num_classes": 4})
    with pytest.raises(UsageError, match="has 4 classes, got 3"):
        model.set_classes(NAMES)


def test_without_classes_there_are_features_only(pixels: torch.Tensor) -> None:
    model = create_clip_model({})
    assert model.head is None
    assert model.encode_images(pixels).shape == (4, 128)
    with pytest.raises(UsageError, match="knows neither class names nor a number of classes"):
        model(pixels)
    with pytest.raises(UsageError, match="no class names"):
        model.text_features()
    model.set_classes(NAMES)
    assert model(pixels).shape == (4, 3)


def test_text_lora_under_a_linear_head_is_made_and_warned_of(pixels: torch.Tensor) -> None:
    config = {"num_classes": 3, "lora": {"target_modules": BOTH}}
    with pytest.warns(FedclipWarning, match="gets no gradient"):
        model = create_clip_model(config)
    assert any("text_model" in name for name in model.get_parameters())
    model(pixels).sum().backward()
    without = {name for name, p in model.trainable().items() if p.grad is None}
    assert without == {name for name in model.trainable() if "text_model" in name}


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "non-empty"), (["cat", " "], "non-empty"), (["cat", "cat"], "twice"), ("cat", "a list")],
)
def test_bad_class_names(names: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_clip_model({}, class_names=names)


def test_bad_template_leaves_the_classes_as_they_were(model: CLIPLoRAWrapper) -> None:
    with pytest.raises(UsageError, match=r"must be a text with \{\}"):
        model.set_classes(["bird"], ["a photo of a dog"])
    assert model.class_names == tuple(NAMES)


def test_bad_configuration_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="r"):
        create_clip_model({"lora": {"r": 128}})
    with pytest.raises(UsageError, match="nmae"):
        create_clip_model({"model_nmae": "tiny"})


# --- full fine-tuning ---


def test_full_fine_tuning_trains_everything(pixels: torch.Tensor) -> None:
    model = create_clip_model(FULL, class_names=NAMES)
    plain = load_base("tiny").model
    assert list(model.get_parameters()) == sorted(name for name, _ in plain.named_parameters())
    assert not model.is_lora_enabled()
    assert model.get_lora_info() == {"enabled": False, "trainable_parameters": 0}
    summary = model.get_model_summary()
    assert summary["trainable_parameters"] == summary["base_parameters"]
    model(pixels).sum().backward()
    assert all(p.grad is not None for p in model.trainable().values())


def test_full_fine_tuning_with_a_linear_head_leaves_text_alone(pixels: torch.Tensor) -> None:
    model = create_clip_model(FULL | {"num_classes": 3})
    names = list(model.get_parameters())
    assert not any("text" in name for name in names)
    assert "logit_scale" not in names
    assert {"head.weight", "head.bias", "visual_projection.weight"} <= set(names)
    model(pixels).sum().backward()
    assert all(p.grad is not None for p in model.trainable().values())


# --- zero-shot ---


@pytest.mark.parametrize(
    "config",
    [{}, {"lora": {"target_modules": BOTH}}, FULL, {"head": "linear"}, FULL | {"head": "linear"}],
)
def test_zero_shot_is_the_base_model(config: dict, pixels: torch.Tensor) -> None:
    fresh = create_clip_model({}, class_names=NAMES)
    model = create_clip_model(config, class_names=NAMES)
    state = shaken(model)
    model.set_parameters(state)
    head = model.head
    with torch.no_grad():
        adapted = model(pixels)
        with model.zero_shot() as base:
            torch.testing.assert_close(base(pixels), fresh(pixels))
        assert torch.equal(model(pixels), adapted)
    assert model.head == head
    assert adapter_sha256(model.get_parameters()) == adapter_sha256(state)
    assert all(p.requires_grad for p in model.trainable().values())


def test_zero_shot_needs_class_names() -> None:
    model = create_clip_model({"num_classes": 3})
    with pytest.raises(UsageError, match="needs class names"), model.zero_shot():
        pass


def test_a_failure_inside_zero_shot_puts_the_adapter_back(pixels: torch.Tensor) -> None:
    model = create_clip_model(FULL, class_names=NAMES)
    model.set_parameters(shaken(model))
    before = model(pixels)
    with pytest.raises(RuntimeError, match="stop"), model.zero_shot():
        raise RuntimeError("stop")
    assert torch.equal(model(pixels), before)


def test_the_guides_import_path() -> None:
    from models.clip import CLIPLoRAWrapper as Wrapper
    from models.clip import create_clip_model as create

    assert (Wrapper, create) == (CLIPLoRAWrapper, create_clip_model)
