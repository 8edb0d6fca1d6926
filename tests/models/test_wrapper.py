"""What the wrapper computes: text features, precision, memory, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fedclip.models.clip import CLIPLoRAWrapper, create_clip_model
from fedclip.models.pretrained import load_base
from fedclip.models.text_head import encode_texts, prompts
from tests.support.models import BOTH, NAMES, shaken, some_pixels


@pytest.fixture
def model() -> CLIPLoRAWrapper:
    return create_clip_model({"lora": {"r": 4}}, class_names=NAMES)


@pytest.fixture
def pixels() -> torch.Tensor:
    return some_pixels()


# --- text features ---


def test_trimmed_prompts_give_what_prompts_of_77_give() -> None:
    base = load_base("tiny")
    rows = base.tokens.encode(["a cat", "a photo of a very large red bicycle", "x"])
    with torch.no_grad():
        trimmed = encode_texts(base.model, base.tokens, rows)
        ids = base.tokens.pad(rows, base.tokens.max_length)
        pooled = base.model.text_projection(base.model.text_model(input_ids=ids).pooler_output)
    torch.testing.assert_close(trimmed, F.normalize(pooled, dim=-1))


def test_templates_are_averaged_on_the_sphere(model: CLIPLoRAWrapper) -> None:
    templates = ["a photo of a {}.", "the {} icon", "{}"]
    model.set_classes(NAMES, templates)
    assert prompts(["cat"], templates) == ["a photo of a cat.", "the cat icon", "cat"]
    base = load_base("tiny")
    with torch.no_grad():
        rows = base.tokens.encode([template.format("dog") for template in templates])
        mean = encode_texts(base.model, base.tokens, rows).mean(dim=0)
    torch.testing.assert_close(model.text_features()[1], mean / mean.norm())
    assert torch.allclose(model.text_features().norm(dim=-1), torch.ones(3))


def count_text_passes(model: CLIPLoRAWrapper) -> list[int]:
    passes: list[int] = []
    model.clip.text_model.register_forward_hook(lambda *_: passes.append(1))
    return passes


def test_a_frozen_text_tower_is_asked_once(model: CLIPLoRAWrapper, pixels: torch.Tensor) -> None:
    passes = count_text_passes(model)
    with torch.inference_mode():
        model(pixels)
    for _ in range(2):
        model.train()
        model(pixels).sum().backward()  # features made under inference_mode must still do
        model.set_parameters(shaken(model))
        model.eval()
        model(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        model(pixels)
    assert len(passes) == 1
    assert not model.text_features().requires_grad
    model.set_classes(["bird"])
    assert model(pixels).shape == (4, 1)
    assert len(passes) == 2


def test_a_trained_text_tower_is_asked_again_when_it_changed(pixels: torch.Tensor) -> None:
    model = create_clip_model({"lora": {"target_modules": BOTH}}, class_names=NAMES)
    passes = count_text_passes(model)
    with torch.no_grad():
        first = model(pixels)
        model(pixels)
        assert len(passes) == 1
        for parameter in model.trainable().values():
            parameter.data.add_(0.1)  # behind every version counter
        assert not torch.equal(model(pixels), first)
        assert len(passes) == 2
        model.train()
        model(pixels)
    model(pixels).sum().backward()
    assert len(passes) == 4
    grads = [p.grad for name, p in model.trainable().items() if "text_model" in name]
    assert all(grad is not None and grad.any() for grad in grads)


# --- precision, memory, devices ---


def test_autocast_keeps_logits_and_parameters_in_fp32(
    model: CLIPLoRAWrapper, pixels: torch.Tensor
) -> None:
    exact = model(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(pixels)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, atol=0.3, rtol=0.05)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_pixels_may_come_normalised(model: CLIPLoRAWrapper, pixels: torch.Tensor) -> None:
    source = load_base("tiny").pixels
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (source.mean, source.std))
    torch.testing.assert_close(model((pixels / 255 - mean) / std), model(pixels))


@pytest.mark.parametrize("targets", [{"vision_encoder": ["q_proj"]}, BOTH])
def test_gradient_checkpointing_gives_the_same_gradients(
    targets: dict[str, list[str]], pixels: torch.Tensor
) -> None:
    grads, calls = [], []
    for checkpointing in (False, True):
        model = create_clip_model(
            {
                "gradient_checkpointing": checkpointing,
                "lora": {"lora_dropout": 0.3, "target_modules": targets},
            },
            class_names=NAMES,
        )
        model.set_parameters(shaken(model))
        model.train()
        model.set_dropout_key(11)
        seen: list[int] = []
        layer = model.clip.vision_model.encoder.layers[1].mlp
        layer.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        F.cross_entropy(model(pixels), torch.tensor([0, 1, 2, 0])).backward()
        calls.append(len(seen))
        grads.append({name: p.grad for name, p in model.trainable().items()})
    assert calls == [1, 2]
    for name, grad in grads[0].items():
        assert grad.any(), name
        torch.testing.assert_close(grads[1][name], grad)


def test_only_what_is_trained_gets_a_gradient(model: CLIPLoRAWrapper, pixels: torch.Tensor) -> None:
    model.train()
    model(pixels).sum().backward()
    trained = {id(p) for p in model.trainable().values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    assert {id(p) for p in model.parameters() if p.grad is not None} == trained
