"""An adapter in the weights: the same logits, and the weights come back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedclip.errors import UsageError
from fedclip.models.clip import CLIPLoRAWrapper, adapter_sha256, create_clip_model
from fedclip.models.peft_lora import base_parameters
from fedclip.models.stacked.clients import StackedClients
from tests.support.models import BOTH, FULL, NAMES, shaken, some_pixels


def make(seed: int = 0, **kwargs: object) -> CLIPLoRAWrapper:
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": BOTH}
    model = create_clip_model({"lora": lora, **kwargs}, class_names=NAMES)
    model.set_parameters(shaken(model, seed))
    return model


@torch.no_grad()
def logits(model: CLIPLoRAWrapper) -> torch.Tensor:
    return model(some_pixels())


def weights(model: CLIPLoRAWrapper) -> str:
    return adapter_sha256(base_parameters(model.network))


@pytest.mark.filterwarnings("ignore:model.lora.target_modules.text_encoder")
@pytest.mark.parametrize("head", ["text", "linear"])
def test_merged_logits_agree_and_unmerging_restores_every_bit(head: str) -> None:
    model = make(head=head)
    before, own = logits(model), weights(model)
    model.merge_lora()
    assert model.is_merged()
    assert weights(model) != own
    merged = logits(model)
    assert (merged - before).abs().max() <= 1e-5 * before.abs().max()
    model.unmerge_lora()
    assert not model.is_merged()
    assert weights(model) == own
    assert torch.equal(logits(model), before)


def test_what_is_merged_is_w_plus_s_b_a() -> None:
    model = make()
    state = model.get_parameters()
    layer = "vision_model.encoder.layers.1.self_attn.v_proj"
    a, b = (state[f"base_model.model.{layer}.lora_{factor}.weight"] for factor in "AB")
    own = base_parameters(model.network)[f"{layer}.weight"].clone()
    model.merge_lora()
    merged = base_parameters(model.network)[f"{layer}.weight"]
    torch.testing.assert_close(merged, own + 8 / 4 * b @ a, rtol=1e-6, atol=1e-6)


def test_merging_twice_is_merging_once_and_so_is_unmerging() -> None:
    model = make()
    own = weights(model)
    model.merge_lora()
    once = weights(model)
    model.merge_lora()
    assert weights(model) == once
    model.unmerge_lora()
    model.unmerge_lora()
    assert weights(model) == own


def test_a_merged_model_tells_and_takes_parameters(tmp_path: Path) -> None:
    model, other = make(), make(seed=1)
    state = model.get_parameters()
    model.merge_lora()
    assert adapter_sha256(model.get_parameters()) == adapter_sha256(state)
    model.save_adapter(tmp_path / "own")
    other.save_adapter(tmp_path / "other")

    model.set_parameters(other.get_parameters())
    assert model.is_merged()
    expected = logits(other)
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    model.load_adapter(tmp_path / "own")
    assert model.is_merged()
    model.unmerge_lora()
    assert adapter_sha256(model.get_parameters()) == adapter_sha256(state)
    assert weights(model) == weights(other)


def test_a_merged_model_takes_another_rank() -> None:
    model, plain = make(), make()
    model.merge_lora()
    for one in (model, plain):
        one.set_rank(2)
    assert model.is_merged()
    expected = logits(plain)
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    model.unmerge_lora()
    assert weights(model) == weights(plain)


def test_zero_shot_of_a_merged_model_is_the_base() -> None:
    model = make()
    with model.zero_shot():
        expected = logits(model)
    model.merge_lora()
    merged = logits(model)
    with model.zero_shot():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), merged)


def test_a_merged_model_does_not_train() -> None:
    model = make()
    model.merge_lora()
    model.eval()
    for call in (model.train, lambda: StackedClients(model), lambda: model.set_shift({})):
        with pytest.raises(UsageError, match=r"merged into the weights.*unmerge_lora\(\) first"):
            call()
    model.unmerge_lora()
    model.train()


def test_a_fully_fine_tuned_model_has_nothing_to_merge() -> None:
    model = create_clip_model(FULL, class_names=NAMES)
    for call in (model.merge_lora, model.unmerge_lora):
        with pytest.raises(UsageError, match=r"trains a full model .*there is no adapter"):
            call()
    assert not model.is_merged()
