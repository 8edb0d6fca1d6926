"""Layer-wise configuration: patterns, plans by hand, PEFT's reading, other ranks in place."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import hypothesis as h
import pytest
import torch
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from fedclip import base_folder
from fedclip.errors import UsageError
from fedclip.lora.layer_patterns import check_hits, factor_of, first_hit, owners, pattern_regex
from fedclip.models.clip import CLIPLoRAWrapper, adapter_sha256, create_clip_model
from fedclip.models.peft_lora import lora_layers, scaling_of
from fedclip.models.pretrained import load_base
from tests.support.models import NAMES, shaken, some_pixels

VISION = "vision_model.encoder.layers"
TARGETS = {
    "vision_encoder": ["q_proj", "fc1", "visual_projection"],
    "text_encoder": ["v_proj", "text_projection"],
}
VISION_ONLY = {"vision_encoder": TARGETS["vision_encoder"]}
LAYERWISE = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": TARGETS,
    "exclude_modules": ["vision_encoder.layers.0"],
    "rank_pattern": {"vision_encoder.layers.3.fc1": 7, "text_model.*": 2, "fc1": 3},
    "alpha_pattern": {"visual_projection": 5},
}
quiet_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def made(lora: dict[str, Any], **options: Any) -> CLIPLoRAWrapper:
    model = create_clip_model({"lora": lora} | options, class_names=NAMES)
    model.set_parameters(shaken(model))
    return model


def products(model: CLIPLoRAWrapper) -> dict[str, torch.Tensor]:
    """Every layer's scaled update, in float64."""
    state = {name: value.double() for name, value in model.get_parameters().items()}
    return {
        path: scaling_of(layer)
        * state[f"base_model.model.{path}.lora_B.weight"]
        @ state[f"base_model.model.{path}.lora_A.weight"]
        for path, layer in lora_layers(model.network).items()
    }


def logits(model: CLIPLoRAWrapper) -> torch.Tensor:
    with torch.no_grad():
        return model(some_pixels())


# --- patterns ---


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("q_proj", f"{VISION}.0.self_attn.q_proj", True),
        ("q_proj", f"{VISION}.0.self_attn.xq_proj", False),
        ("q_proj|fc1", f"{VISION}.0.mlp.fc1", True),
        ("layers.1.mlp.fc1", f"{VISION}.1.mlp.fc1", True),
        ("layers.1.mlp.fc1", f"{VISION}.11.mlp.fc1", False),
        ("vision_encoder", f"{VISION}.1.mlp.fc1", True),
        ("vision_encoder", "visual_projection", True),
        ("vision_encoder", "text_model.encoder.layers.0.mlp.fc1", False),
        ("vision_encoder", "text_projection", False),
        ("text_encoder.fc1", "text_model.encoder.layers.0.mlp.fc1", True),
        ("text_encoder.fc1", "text_projection", False),
        ("text_encoder.text_projection", "text_projection", True),
        ("vision_encoder.layers.1", f"{VISION}.1.mlp.fc1", True),
        ("vision_encoder.layers.1", f"{VISION}.11.mlp.fc1", False),
        ("vision_encoder.layers.1-3", f"{VISION}.3.mlp.fc1", True),
        ("vision_encoder.layers.1-3", f"{VISION}.4.mlp.fc1", False),
        ("vision_encoder.layers.3-1", f"{VISION}.2.mlp.fc1", False),
        ("vision_encoder.layers.1-3.q_proj", f"{VISION}.2.self_attn.q_proj", True),
        ("vision_encoder.layers.1-3.q_proj", f"{VISION}.2.self_attn.k_proj", False),
    ],
)
def test_what_patterns_fit(pattern: str, path: str, fits: bool) -> None:
    assert bool(pattern_regex(pattern).fullmatch(path)) is fits


def test_other_patterns_are_read_as_peft_reads_them() -> None:
    patterns = ["q_proj", r"layers\.[01]\..*", r".*fc\d", "vision_model", "el.*|fc2", ".+", "k"]
    paths = [name for name, _ in load_base("tiny").model.named_modules() if name]
    for path in paths:
        for pattern in patterns:
            theirs = get_pattern_key([pattern], path) == pattern
            assert bool(pattern_regex(pattern).fullmatch(path)) is (theirs or path == pattern)
        hit = get_pattern_key(patterns, path)
        assert first_hit({p: p for p in patterns}, path, path) == hit


def test_tensors_are_known_by_their_own_name_and_their_layer_s() -> None:
    layer = f"{VISION}.0.mlp.fc1"
    b = f"base_model.model.{layer}.lora_B.weight"
    assert owners(b) == [f"{layer}.lora_B.weight", f"{layer}.lora_B", layer]
    assert owners("head.bias") == ["head.bias", "head"]
    assert owners(f"{layer}.weight") == [f"{layer}.weight", layer]
    assert factor_of({"lora_B": 16, "vision_encoder": 0.5}, b) == 16
    assert factor_of({"lora_A": 16, "vision_encoder": 0.5}, b) == 0.5
    assert factor_of({"vision_encoder.lora_B": 3}, b) == 3
    assert factor_of({"fc2": 3, "head": 2}, b) == 1
    assert factor_of({"fc2": 3, "head": 2}, "head.bias") == 2


def test_a_pattern_that_nothing_fits_is_named_with_some_paths() -> None:
    paths = [f"{VISION}.{i}.mlp.fc1" for i in range(5)]
    with pytest.raises(UsageError, match=r"key: nothing fits the pattern 'fc9'; .*layers\.0\.mlp"):
        check_hits("key", ["fc1", "fc9"], paths)
    with pytest.raises(UsageError, match=r"key: 'fc\(' is not a regular expression"):
        check_hits("key", ["fc("], paths)


# --- what a configuration makes ---


def test_ranks_scales_and_layers_by_hand() -> None:
    info = made(LAYERWISE).get_lora_info()
    text = "text_model.encoder.layers"
    ranks = {
        f"{VISION}.1.self_attn.q_proj": 4,
        f"{VISION}.1.mlp.fc1": 3,
        f"{VISION}.2.self_attn.q_proj": 4,
        f"{VISION}.2.mlp.fc1": 3,
        f"{VISION}.3.self_attn.q_proj": 4,
        f"{VISION}.3.mlp.fc1": 7,
        "visual_projection": 4,
        f"{text}.0.self_attn.v_proj": 2,
        f"{text}.1.self_attn.v_proj": 2,
        "text_projection": 4,
    }
    assert info["ranks"] == ranks
    assert info["alphas"] == {p: 2 * r for p, r in ranks.items()} | {"visual_projection": 5}
    assert "dropouts" not in info
    assert info["exclude_modules"] == ["vision_encoder.layers.0"]
    # tiny: width 128, fc1 128 -> 512; a projection goes from width to the features.
    clip = load_base("tiny").model
    sides = [sum(m.weight.shape) for m in (clip.visual_projection, clip.text_projection)]
    count = 3 * 4 * 256 + (3 + 3 + 7) * 640 + 2 * 2 * 256 + 4 * sum(sides)
    assert info["trainable_parameters"] == count


def test_what_all_layers_share_is_said_once() -> None:
    info = made({"r": 8, "lora_alpha": 16, "rank_pattern": {".+": 4}}).get_lora_info()
    assert (info["r"], info["lora_alpha"]) == (4, 8)
    assert not info.keys() & {"ranks", "alphas", "dropouts"}


def test_a_start_does_not_depend_on_other_layers_ranks() -> None:
    name = f"base_model.model.{VISION}.3.self_attn.q_proj.lora_A.weight"
    plain = create_clip_model({"lora": {"r": 4}}).get_parameters()[name]
    mixed = create_clip_model({"lora": {"r": 2, "rank_pattern": {"layers.3.*": 4}}})
    assert torch.equal(mixed.get_parameters()[name], plain)


def test_dropout_by_layer() -> None:
    lora = {"lora_dropout": 0.1, "dropout_pattern": {"q_proj": 0.3, "k_proj": 0}}
    model = made(lora)
    dropouts = model.get_lora_info()["dropouts"]
    ends = {"q_proj": 0.3, "k_proj": 0.0, "v_proj": 0.1, "out_proj": 0.1}
    assert dropouts == {path: ends[path.rpartition(".")[2]] for path in dropouts}
    model.train()
    layers = lora_layers(model.network)
    x = torch.ones(2, 128)
    shares = {
        end: (layers[f"{VISION}.0.self_attn.{end}"].lora_dropout["default"](x) == 0).float().mean()
        for end in ends
    }
    assert shares["k_proj"] == 0
    assert shares["q_proj"] > shares["v_proj"] > 0


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    lora = {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"q_proj": 9}}
    model = made(lora)
    layers = lora_layers(model.network)
    assert [scaling_of(layer) for layer in layers.values()] == [pytest.approx(3.0)] * 16
    assert layers[f"{VISION}.0.self_attn.q_proj"].lora_alpha["default"] == pytest.approx(9.0)
    layer = layers[f"{VISION}.0.self_attn.k_proj"]
    with model.scaled_for_rank(2):
        assert layer.scaling["default"] == 6 / math.sqrt(2)
    with model.scaled_for_rank(5):  # the layer's own rank is lower
        assert layer.scaling["default"] == 3.0
    assert layer.scaling["default"] == 3.0
    assert model.get_lora_info()["use_rslora"] is True


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank_pattern": {"fc1": 2}}, r"model\.lora\.rank_pattern: nothing fits .*'fc1'.*k_proj"),
        ({"alpha_pattern": {"text_encoder": 2}}, r"alpha_pattern: nothing fits"),
        ({"dropout_pattern": {"x": 0.1}}, r"dropout_pattern: nothing fits"),
        ({"exclude_modules": ["fc2"]}, r"exclude_modules: nothing fits"),
        ({"exclude_modules": ["vision_encoder"]}, "excludes every layer"),
        (
            {"exclude_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}},
            r"rank_pattern: nothing fits",
        ),
        ({"rank_pattern": {"q_proj": 65}}, r"rank_pattern\[q_proj\] must be a whole number from 1"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\[q_proj\] must be a whole number from 1"),
        ({"rank_pattern": {"q_proj": "4"}}, r"rank_pattern\[q_proj\] .* got the text '4'"),
        ({"rank_pattern": 4}, r"rank_pattern must be a mapping of patterns \(a whole .* got 4"),
        ({"rank_pattern": {"q_proj(": 4}}, r"'q_proj\(' is not a regular expression: missing \)"),
        ({"exclude_modules": ["["]}, r"exclude_modules\[0\]: '\[' is not a regular expression"),
        ({"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern\[q_proj\] must be a number > 0, got 0"),
        ({"dropout_pattern": {"q.proj": 0.5}}, r"dropout_pattern\[q.proj\] must be .* to 0.3"),
        ({"target_modules": {"vision_encoder": ["text_projection"]}}, "visual_projection, got"),
    ],
)
def test_bad_configurations(lora: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_clip_model({"lora": lora})


# --- PEFT ---


def in_peft(folder: Path) -> torch.Tensor:
    peft = PeftModel.from_pretrained(CLIPModel.from_pretrained(base_folder("tiny")), folder)
    tokens = load_base("tiny").tokens
    input_ids = tokens.pad(tokens.encode([f"a photo of a {name}." for name in NAMES]))
    pixels = create_clip_model({}).normalised(some_pixels())
    with torch.no_grad():
        return peft(input_ids=input_ids, pixel_values=pixels).logits_per_image


@quiet_peft
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True, "lora_dropout": 0.1},
        {"lora_alpha": 7.5, "last_layers": 2, "exclude_modules": [], "alpha_pattern": {}},
    ],
    ids=str,
)
def test_peft_and_a_twin_give_the_same_logits(tmp_path: Path, change: dict) -> None:
    lora = LAYERWISE | {"lora_dropout": 0.0} | change
    if "last_layers" in change:
        lora |= {"rank_pattern": {"fc1": 3}}
    model = made(lora)
    model.save_adapter(tmp_path / "adapter")
    ours = logits(model)
    assert (in_peft(tmp_path / "adapter") - ours).abs().max() <= 1e-5 * ours.abs().max()
    twin = create_clip_model({"lora": lora}, class_names=NAMES, seed=1)
    twin.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(twin), ours)
    assert twin.get_lora_info() == model.get_lora_info()
    names = get_peft_model_state_dict(model.network, save_embedding_layers=False)
    assert sorted(names) == sorted(model.get_parameters())


def test_dora_starts_as_no_change_and_trains_magnitudes() -> None:
    lora = {"use_dora": True, "target_modules": TARGETS}
    model = create_clip_model({"lora": lora}, class_names=NAMES)
    with model.zero_shot():
        expected = logits(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    name = f"base_model.model.{VISION}.0.self_attn.q_proj.lora_magnitude_vector"
    weight = load_base("tiny").model.vision_model.encoder.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(model.get_parameters()[name], weight.detach().norm(dim=1))
    model(some_pixels()).square().sum().backward()
    assert model.trainable()[name].grad.abs().max() > 0
    assert not any("magnitude" in n for n in model.clip.state_dict() if "lora" not in n)
    summary = model.get_model_summary()
    assert summary["base_parameters"] == sum(
        p.numel() for p in load_base("tiny").model.parameters()
    )


# --- set_rank ---


@h.settings(max_examples=8, deadline=None, derandomize=True)
@h.given(
    rank=st.one_of(
        st.integers(1, 12),
        st.fixed_dictionaries({"fc1": st.integers(1, 9), "vision_encoder": st.integers(1, 9)}),
    ),
    rslora=st.booleans(),
)
def test_set_rank_keeps_the_update_as_well_as_the_rank_allows(rank: Any, rslora: bool) -> None:
    model = made(LAYERWISE | {"use_rslora": rslora})
    before, scalings = (
        products(model),
        {path: scaling_of(layer) for path, layer in lora_layers(model.network).items()},
    )
    was = model.get_lora_info()["ranks"]
    model.set_rank(rank)
    for path, layer in lora_layers(model.network).items():
        now = rank if isinstance(rank, int) else first_hit(rank, path, was[path])
        assert layer.r["default"] == now
        assert scaling_of(layer) == pytest.approx(scalings[path], rel=1e-11)
        left_out = torch.linalg.svdvals(before[path])[now:].norm()
        off = (products(model)[path] - before[path]).norm()
        assert off <= left_out * (1 + 1e-4) + 1e-6 * before[path].norm()
    info = model.get_lora_info()
    assert info["trainable_parameters"] == sum(p.numel() for p in model.get_parameters().values())
    assert all(parameter.requires_grad for parameter in model.trainable().values())


def test_growing_changes_no_output_and_new_rows_train() -> None:
    model = made({"r": 3, "lora_alpha": 6, "target_modules": VISION_ONLY}, head="linear")
    head = model.get_parameters()["head.weight"]
    expected = logits(model)
    model.set_rank({"fc1": 5})
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.get_parameters()["head.weight"], head)
    b = f"base_model.model.{VISION}.0.mlp.fc1.lora_B.weight"
    model(some_pixels()).square().sum().backward()
    gradient = model.trainable()[b].grad
    assert gradient.shape == (512, 5)
    assert gradient[:, 3:].abs().max() > 0
    twin = made({"r": 3, "lora_alpha": 6, "target_modules": VISION_ONLY}, head="linear")
    twin.set_rank({"fc1": 5})
    assert adapter_sha256(twin.get_parameters()) == adapter_sha256(model.get_parameters())


@quiet_peft
def test_after_set_rank_all_is_true_here_and_in_peft(tmp_path: Path) -> None:
    model = made({"r": 6, "lora_alpha": 12, "target_modules": TARGETS})
    model.set_rank({"vision_encoder": 3})
    model.set_rank({"text_projection": 100})
    model.save_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 12)
    assert config["rank_pattern"]["text_projection"] == 100
    assert config["alpha_pattern"]["visual_projection"] == 6
    ours = logits(model)
    assert (in_peft(tmp_path / "adapter") - ours).abs().max() <= 1e-5 * ours.abs().max()
    other = create_clip_model({"lora": {"r": 2, "target_modules": TARGETS}}, class_names=NAMES)
    other.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(other), ours)
    assert other.get_lora_info() == model.get_lora_info()
    other.set_parameters(shaken(other))


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "a whole number >= 1, got 0"),
        (True, "a whole number >= 1, got True"),
        (2.0, r"a whole number >= 1, got 2\.0"),
        ({"q_proj": "3"}, "got '3' for 'q_proj'"),
        ({"fc2": 3}, "set_rank: nothing fits the pattern 'fc2'"),
        ({"(": 3}, "not a regular expression"),
    ],
)
def test_a_bad_rank_changes_nothing(rank: Any, message: str) -> None:
    model = made({"r": 4})
    before = adapter_sha256(model.get_parameters())
    with pytest.raises(UsageError, match=message):
        model.set_rank(rank)
    assert adapter_sha256(model.get_parameters()) == before


def test_full_fine_tuning_has_no_rank() -> None:
    with pytest.raises(
        UsageError, match=r"trains a full model \(model.lora.enabled: false\), which has no rank"
    ):
        create_clip_model({"lora": {"enabled": False}}).set_rank(4)


# --- folders whose ranks are their own ---


def test_an_adapter_of_one_rank_comes_along_after_set_rank(tmp_path: Path) -> None:
    model = made({"r": 4})
    model.set_rank(6)
    model.save_adapter(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "fedclip.json").read_text())["own_ranks"] is True
    other = create_clip_model({"lora": {"r": 2}}, class_names=NAMES)
    other.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(other), logits(model))
    info = other.get_lora_info()
    assert (info["r"], info["lora_alpha"]) == (6, 12)
    other.save_adapter(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors", "fedclip.json"):
        assert (tmp_path / "again" / name).read_bytes() == (
            tmp_path / "adapter" / name
        ).read_bytes()


def test_a_stacked_adapter_of_a_high_rank_needs_no_notes(tmp_path: Path) -> None:
    """Eight copies of an adapter side by side, at an eighth of its scaling, are the adapter."""
    model = made({"r": 16, "lora_alpha": 32})
    expected = logits(model)
    model.save_adapter(tmp_path / "adapter")
    file, told = (
        tmp_path / "adapter" / n for n in ("adapter_model.safetensors", "adapter_config.json")
    )
    (tmp_path / "adapter" / "fedclip.json").unlink()
    wide = {
        n: torch.cat([t] * 8, dim=0 if "lora_A" in n else 1) for n, t in load_file(file).items()
    }
    save_file(wide, file)
    told.write_text(json.dumps(json.loads(told.read_text()) | {"r": 128, "lora_alpha": 32}))
    other = create_clip_model({}, class_names=NAMES)
    other.load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(logits(other), expected, rtol=1e-4, atol=1e-4)
    assert other.get_lora_info()["r"] == 128


@pytest.mark.parametrize(
    ("lora", "config", "message"),
    [
        ({"r": 4, "target_modules": {"vision_encoder": ["fc1"]}}, {}, "target_modules"),
        ({"r": 4, "use_rslora": True}, {}, "has use_rslora False, the model True"),
        ({"r": 4, "use_dora": True}, {}, "has use_dora False, the model True"),
        ({"r": 4}, {"r": 3}, "has shape"),
        ({"r": 4}, {"r": "x"}, "'x' and lora_alpha"),
        ({"r": 4}, {"lora_alpha": -1, "alpha_pattern": {".*": 3}}, "lora_alpha -1 of the adapter"),
        ({"r": 4}, {"rank_pattern": [3]}, "rank_pattern must be a mapping"),
        ({"r": 4}, {"rank_pattern": {"(": 3}}, "not a regular expression"),
        ({"r": 4}, {"rank_pattern": {"q_proj": 1.5}}, "r 1.5 and lora_alpha"),
        ({"r": 4}, {"alpha_pattern": {"q_proj": None}}, "lora_alpha None"),
    ],
)
def test_misfits_change_nothing(tmp_path: Path, lora: dict, config: dict, message: str) -> None:
    made({"r": 4, "rank_pattern": {"q_proj": 3}}).save_adapter(tmp_path / "adapter")
    told = tmp_path / "adapter" / "adapter_config.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | config))
    (tmp_path / "adapter" / "fedclip.json").unlink()  # whose digests would tell first
    model = create_clip_model({"lora": lora})
    before, info = adapter_sha256(model.get_parameters()), model.get_lora_info()
    with pytest.raises(UsageError, match=message):
        model.load_adapter(tmp_path / "adapter")
    assert adapter_sha256(model.get_parameters()) == before
    assert (model.get_lora_info(), model.class_names) == (info, ())


def test_tensors_of_other_ranks_are_refused() -> None:
    model = made({"r": 4, "rank_pattern": {"q_proj": 3}})
    before = adapter_sha256(model.get_parameters())
    plain = create_clip_model({"lora": {"r": 4}}).get_parameters()
    with pytest.raises(UsageError, match=r"q_proj\.lora_A\.weight has shape \[4, 128\], expected"):
        model.set_parameters(plain)
    assert adapter_sha256(model.get_parameters()) == before
