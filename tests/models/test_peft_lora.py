"""LoRA against arithmetic by hand, and against PEFT's own files and names."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import nn

from fedclip.errors import UsageError
from fedclip.models.clip import create_clip_model
from fedclip.models.dropout import KeyedDropout, keep_scale, kept
from fedclip.models.lora_settings import target_regex
from fedclip.models.peft_lora import base_parameters, lora_parameters, tower_of
from fedclip.models.pretrained import load_base

QKVO = ["q_proj", "k_proj", "v_proj", "out_proj"]
LAYER = "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj"


def lora(r: int = 2, dropout: float = 0.0, **targets: list[str]) -> dict:
    return {"r": r, "lora_alpha": 2 * r, "lora_dropout": dropout, "target_modules": targets}


def test_forward_is_w_x_plus_scaled_b_a_x() -> None:
    model = create_clip_model(
        {"lora": {"r": 2, "lora_alpha": 3, "target_modules": {"vision_encoder": ["q_proj"]}}}
    )
    layer = model.clip.vision_model.encoder.layers[0].self_attn.q_proj
    w, bias = layer.base_layer.weight.detach(), layer.base_layer.bias.detach()
    generator = torch.Generator().manual_seed(0)
    state = model.get_parameters()
    a = torch.randn(state[f"{LAYER}.lora_A.weight"].shape, generator=generator)  # [r, in]
    b = torch.randn(state[f"{LAYER}.lora_B.weight"].shape, generator=generator)  # [out, r]
    model.set_parameters(state | {f"{LAYER}.lora_A.weight": a, f"{LAYER}.lora_B.weight": b})
    x = torch.randn(w.shape[1], generator=generator)
    by_hand = w @ x + bias + 3 / 2 * (b @ (a @ x))
    torch.testing.assert_close(layer(x).detach(), by_hand)


def test_the_start_changes_nothing() -> None:
    model = create_clip_model({"lora": lora(vision_encoder=QKVO, text_encoder=QKVO)})
    plain = load_base("tiny").model
    pixels = torch.rand(2, 3, model.image_size, model.image_size)
    with torch.no_grad():
        expected = plain.visual_projection(plain.vision_model(pixel_values=pixels).pooler_output)
        found = model.encode_images(pixels)
    torch.testing.assert_close(found, nn.functional.normalize(expected, dim=-1))


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ({"vision_encoder": QKVO}, 4 * 4),
        ({"text_encoder": QKVO}, 2 * 4),
        ({"vision_encoder": QKVO, "text_encoder": ["q_proj"]}, 4 * 4 + 2),
    ],
)
def test_attention_counts_by_hand(targets: dict[str, list[str]], layers: int) -> None:
    # tiny: 4 vision and 2 text layers, both of width 128, so a layer has r * (128 + 128).
    model = create_clip_model({"lora": lora(8, **targets)})
    assert model.get_lora_info()["trainable_parameters"] == layers * 8 * 256
    assert len(model.get_parameters()) == 2 * layers


def test_mlp_counts_by_hand() -> None:
    model = create_clip_model({"lora": lora(4, vision_encoder=["fc1", "fc2"])})
    # fc1 is 128 -> 512 and fc2 back: 2 * r * (128 + 512) a layer.
    assert model.get_lora_info()["trainable_parameters"] == 4 * 2 * 4 * 640


def test_names_are_those_of_pefts_own_file() -> None:
    model = create_clip_model({"lora": lora(4, 0.1, vision_encoder=QKVO, text_encoder=["fc1"])})
    saved = get_peft_model_state_dict(model.network, save_embedding_layers=False)
    state = model.get_parameters()
    assert sorted(saved) == list(state)
    assert all(torch.equal(saved[name], value) for name, value in state.items())
    assert list(lora_parameters(model.network)) == list(state)


def test_base_names_are_clips_own() -> None:
    plain = load_base("tiny").model
    model = create_clip_model({"lora": lora(vision_encoder=QKVO)})
    names = sorted(name for name, _ in plain.named_parameters())
    assert list(base_parameters(model.network)) == names == list(base_parameters(plain))


def test_a_is_drawn_by_seed_and_layer_name_alone() -> None:
    both = create_clip_model({"lora": lora(vision_encoder=QKVO, text_encoder=QKVO)}, seed=5)
    torch.manual_seed(99)
    one = create_clip_model({"lora": lora(vision_encoder=["q_proj"])}, seed=5)
    other = create_clip_model({"lora": lora(vision_encoder=["q_proj"])}, seed=6)
    name = f"{LAYER}.lora_A.weight"
    start = both.get_parameters()
    assert all(torch.equal(start[key], value) for key, value in one.get_parameters().items())
    assert not torch.equal(start[name], other.get_parameters()[name])
    assert not any(value.any() for key, value in start.items() if "lora_B" in key)


def test_a_has_the_spread_that_peft_gives_it() -> None:
    a = create_clip_model({"lora": lora(8, vision_encoder=QKVO)}).get_parameters()
    values = torch.cat([value.flatten() for name, value in a.items() if "lora_A" in name])
    bound = 128**-0.5
    assert values.abs().max() <= bound
    assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_making_a_model_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    create_clip_model({"model_name": "random:tiny", "num_classes": 3})
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_targets_name_the_known() -> None:
    with pytest.raises(UsageError, match="'query' is not known; known are q_proj, k_proj"):
        target_regex({"vision_encoder": ["query"]})
    with pytest.raises(UsageError, match="'audio' is not known; known are vision_encoder"):
        target_regex({"audio": ["q_proj"]})
    with pytest.raises(UsageError, match="names no layer"):
        target_regex({"vision_encoder": [], "text_encoder": None})


def test_target_regex_matches_the_layers_asked_for_and_no_other() -> None:
    names = create_clip_model({"lora": lora(text_encoder=["fc2", "q_proj"])}).get_parameters()
    layers = {name.split(".lora_")[0].split(".layers.")[1] for name in names}
    assert layers == {f"{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.fc2")}
    assert {tower_of(name) for name in names} == {"text_encoder"}


def test_tower_of_every_parameter() -> None:
    towers = {name: tower_of(name) for name in base_parameters(load_base("tiny").model)}
    assert towers["text_projection.weight"] == "text_encoder"
    assert towers["visual_projection.weight"] == "vision_encoder"
    assert [name for name, tower in towers.items() if not tower] == ["logit_scale"]


def test_keyed_dropout_depends_on_key_and_layer_only() -> None:
    x = torch.ones(64, 64)
    first, twin, other = (KeyedDropout(0.25, name) for name in ("a", "a", "b"))
    for layer in (first, twin, other):
        layer.key = 7
    mask = first(x)
    torch.manual_seed(1)
    assert torch.equal(first(x), mask)
    assert torch.equal(twin(x), mask)
    assert not torch.equal(other(x), mask)
    first.key = 8
    assert not torch.equal(first(x), mask)
    assert mask.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert (mask == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    kept_ones = kept(x.shape, 0.25, 7, "a", x.device)
    first.key = 7
    assert torch.equal(first(x), kept_ones * keep_scale(0.25))


def test_the_share_dropped_is_the_share_asked_for() -> None:
    for p in (0.05, 0.3):
        mask = kept(torch.Size((1000, 1000)), p, 1, "a", torch.device("cpu"))
        dropped = 1 - mask.double().mean().item()
        assert dropped == pytest.approx(p, abs=5 * (p * (1 - p) / 1e6) ** 0.5)
        assert mask.double().mean().item() * keep_scale(p) == pytest.approx(1, abs=0.003)


def test_dropout_without_key_is_pytorchs_own() -> None:
    x = torch.ones(32, 32)
    torch.manual_seed(3)
    found = KeyedDropout(0.3, "a")(x)
    torch.manual_seed(3)
    assert torch.equal(found, nn.functional.dropout(x, 0.3))
    assert torch.equal(KeyedDropout(0.3, "a").eval()(x), x)


def test_dropout_reaches_the_adapter_and_holds_no_tensors() -> None:
    model = create_clip_model({"lora": lora(4, 0.3, vision_encoder=QKVO)}, class_names=["a", "b"])
    state = model.get_parameters()
    model.set_parameters({name: torch.full_like(value, 0.1) for name, value in state.items()})
    pixels = torch.rand(2, 3, model.image_size, model.image_size)
    model.train()
    model.set_dropout_key(1)
    first, again = model(pixels), model(pixels)
    model.set_dropout_key(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, model(pixels))
    model.set_dropout_key(None)
    assert not torch.equal(model(pixels), model(pixels))
    model.eval()
    assert torch.equal(model(pixels), model(pixels))
    assert not any("dropout" in name for name in model.state_dict())
