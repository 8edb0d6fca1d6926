"""Several tasks on one model: classes and adapters that change by name."""

import numpy as np
import pytest
import torch

from fedclip.errors import UsageError
from fedclip.models.clip import create_clip_model
from fedclip.models.peft_lora import lora_layers

DIGITS, CLOTHES = ["zero", "one", "two"], ["shirt", "coat"]


@pytest.fixture
def model():
    found = create_clip_model({"model_name": "tiny"}, class_names=[*DIGITS, *CLOTHES])
    found.add_task("digits", DIGITS, ["the digit {}"])
    found.add_task("clothes", CLOTHES, own_adapter=True)
    found.add_task("shoes", ["boot", "sandal"], own_adapter=True)
    return found


def pixels(model):
    size = model.image_size
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (2, 3, size, size), dtype=np.uint8)
    )


def moved(state, by):
    return {name: tensor + by for name, tensor in state.items()}


def test_a_task_has_its_own_classes_and_prompts(model):
    assert model.tasks() == ("digits", "clothes", "shoes")
    assert model.task is None
    with torch.no_grad():
        everything = model(pixels(model))
        assert everything.shape == (2, 5)
        model.set_task("digits")
        assert (model.task, model.class_names) == ("digits", tuple(DIGITS))
        assert model.templates == ("the digit {}",)
        alone = create_clip_model(
            {"model_name": "tiny"}, class_names=DIGITS, templates=["the digit {}"]
        )
        assert torch.equal(model(pixels(model)), alone(pixels(model)))
        model.set_task(None)
        assert torch.equal(model(pixels(model)), everything)


def test_tasks_without_an_adapter_of_their_own_share_one(model):
    changed = moved(model.get_parameters(), 0.1)
    model.set_parameters(changed)
    model.set_task("digits")
    for name, tensor in model.get_parameters().items():
        assert torch.equal(tensor, changed[name])


def test_adapters_of_their_own_are_kept_while_others_are_in_the_model(model):
    start = model.get_parameters()
    model.set_task("clothes")
    for name, tensor in model.get_parameters().items():
        assert torch.equal(tensor, start[name])  # a copy of what was there
    model.set_parameters(moved(start, 1.0))
    model.set_task("shoes")
    model.set_parameters(moved(start, 2.0))
    model.set_task("digits")
    model.set_parameters(moved(start, 3.0))
    for task, by in (("clothes", 1.0), ("shoes", 2.0), (None, 3.0), ("digits", 3.0)):
        model.set_task(task)
        for name, tensor in model.get_parameters().items():
            assert torch.equal(tensor, start[name] + by), task


def test_a_shift_of_the_weights_reaches_the_texts_of_all_tasks():
    layers = {"vision_encoder": [], "text_encoder": ["fc1"]}
    model = create_clip_model(
        {"model_name": "tiny", "lora": {"target_modules": layers}}, class_names=DIGITS
    )
    model.add_task("clothes", CLOTHES)
    path = next(iter(lora_layers(model.network)))
    with torch.no_grad():
        before = model.text_features()
        model.set_task("clothes")
        other = model.text_features()
        weight = model.clip.get_submodule(path).base_layer.weight
        model.set_shift({path: torch.full_like(weight, 0.05)})
        assert not torch.equal(model.text_features(), other)
        model.set_task(None)
        assert not torch.equal(model.text_features(), before)


def test_what_cannot_be_is_refused(model):
    with pytest.raises(UsageError, match=r"no task 'hats'; known tasks: digits, clothes, shoes"):
        model.set_task("hats")
    with pytest.raises(UsageError, match="'digits' already"):
        model.add_task("digits", DIGITS)
    with pytest.raises(UsageError, match="differ from each other"):
        model.add_task("twice", ["a", "a"])
    linear = create_clip_model({"model_name": "tiny", "num_classes": 3, "head": "linear"})
    with pytest.raises(UsageError, match="linear head has one set of classes"):
        linear.add_task("digits", DIGITS)
