"""The wrapper: heads, tensors in and out, text features, precision, zero-shot."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedclip.errors import FedclipWarning, UsageError
from fedclip.models.base import load_base
from fedclip.models.clip import CLIPLoRAWrapper, adapter_sha256, create_clip_model
from fedclip.models.text import encode_texts, prompts
from tests.models_help import NAMES, shaken

BOTH = {"vision_encoder": ["q_proj", "v_proj"], "text_encoder": ["q_proj", "v_proj"]}
FULL = {"lora": {"enabled": False}}


@pytest.fixture
def model() -> CLIPLoRAWrapper:
    return create_clip_model({"lora": {"r": 4}}, class_names=NAMES)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8))


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


# --- tensors in and out ---


def test_parameters_are_copies(model: CLIPLoRAWrapper) -> None:
    state = model.get_parameters()
    for value in state.values():
        value.fill_(9.0)
    assert not any((value == 9.0).any() for value in model.get_parameters().values())
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert not any(value.requires_grad for value in state.values())


@pytest.mark.parametrize("kind", ["torch", "numpy", "read-only numpy", "float64", "bfloat16"])
def test_set_parameters_takes(model: CLIPLoRAWrapper, kind: str) -> None:
    state = shaken(model)
    given: dict[str, object] = dict(state)
    if "numpy" in kind:
        arrays = {name: value.numpy() for name, value in state.items()}
        for array in arrays.values():
            array.flags.writeable = False
        given = arrays if "read" in kind else {n: a.copy() for n, a in arrays.items()}
    elif kind != "torch":
        dtype = getattr(torch, kind)
        given = {name: value.to(dtype) for name, value in state.items()}
        state = {name: value.to(dtype).float() for name, value in state.items()}
    model.set_parameters(given)
    found = model.get_parameters()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def bad_states() -> Iterator[tuple[str, object, str]]:
    good = {"r": 4}
    state = shaken(create_clip_model({"lora": good}))
    first, *_, last = state
    without = {name: value for name, value in state.items() if name != last}
    yield "a missing tensor", without, f"lacks 1 tensors of this model .*{last}"
    yield "an unknown tensor", state | {"x": state[first]}, r"has 1 that this model does not train"
    other = create_clip_model({"lora": {"r": 2}}).get_parameters()
    yield "another rank", other, "the adapter has rank 2, the model rank 4"
    fc = {"r": 4, "target_modules": {"vision_encoder": ["fc1"]}}
    yield "other targets", create_clip_model({"lora": fc}).get_parameters(), "target_modules"
    yield "a wrong shape", state | {last: state[last].T}, rf"{last} has shape \[4, 128\]"
    nan = state[last].clone()
    nan[0, 0] = float("nan")
    yield "NaN", state | {last: nan}, "not finite"
    yield "too large", state | {last: state[last].double() * 1e300}, "not finite"
    yield "integers", state | {last: state[last].int()}, "floating-point"
    yield "no tensor", state | {last: [1.0]}, "is a list, not a tensor"
    yield "no mapping", list(state.values()), "expected tensors by name, got list"


@pytest.mark.parametrize(("what", "state", "message"), [*bad_states()], ids=lambda v: str(v)[:20])
def test_set_parameters_refuses(
    model: CLIPLoRAWrapper, what: str, state: object, message: str
) -> None:
    before = adapter_sha256(model.get_parameters())
    with pytest.raises(UsageError, match=message):
        model.set_parameters(state)
    assert adapter_sha256(model.get_parameters()) == before, what


def test_sha256_depends_on_names_dtypes_shapes_and_values() -> None:
    value = torch.arange(6, dtype=torch.float32)
    digests = [
        adapter_sha256(state)
        for state in (
            {"a": value},
            {"b": value},
            {"a": value.view(2, 3)},
            {"a": value.double()},
            {"a": value + 1},
            {"a": value, "b": torch.tensor(1.0)},
        )
    ]
    assert len(set(digests)) == len(digests)
    assert adapter_sha256({"b": value, "a": value}) == adapter_sha256({"a": value, "b": value})


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
