"""Strategies that fold what a rank-r adapter cannot hold into the frozen weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from fedclip.federated.strategies.base import (
    Setting,
    Strategy,
    Train,
    at_client_ranks,
    examples,
    factors,
    held,
    layer_updates,
    others,
    refuse_ranks,
)
from fedclip.lora.aggregate import StackedLora, mean_of_factors, residual, stack
from fedclip.lora.factors import Factors
from fedclip.lora.names import pairs
from fedclip.records import RunState, State, TrainRequest


class FLoRA(Strategy):
    """All updates stacked and folded into the frozen weights; the adapter starts afresh.

    Wang et al. 2024 (arXiv:2409.05976): W0 += sum_i p_i s_i B_i A_i, exact for any ranks, then A is
    drawn anew and B = 0. Bytes per client and round: 4 r_i (in + out) up and 4 (sum of r_i)
    (in + out) down, for each layer. The adapter that is saved holds the whole change.
    """

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """The shifted weights and a fresh adapter."""
        updates = train(at_client_ranks(self.setting, request)).stacked()
        weights = examples(updates)
        rest = others(updates.tensors, weights)
        shared, shift, news = {**state.shared, **rest}, dict(state.shift), dict(rest)
        for layer, pair in pairs(updates.tensors).items():
            x = layer_updates(self.setting, updates, layer, pair, weights)
            whole = stack(x, ranks=held(self.setting, updates, x.a.shape[1]))
            shift[layer] = added(shift, layer, whole.product())
            news[pair.a], news[pair.b] = whole
            fresh = fresh_factors(self.setting, layer, factors(state.shared, pair), request)
            shared[pair.a], shared[pair.b] = fresh
        return replace(state, shared=shared, shift=shift, news=news)


class FedEx(Strategy):
    """The mean of the factors, and what it misses folded into the frozen weights: exact.

    Singhal et al. 2024 (arXiv:2410.09432): W0 += s (sum_i p_i B_i A_i - Bbar Abar). Bytes per
    client and round: 4 r (in + out) up; down as much and the residual, 4 (K - 1) r (in + out) in
    factors or 4 in * out dense where that is less, for each layer and K clients.
    """

    def __init__(self, setting: Setting | None = None) -> None:
        """Refuses clients of different ranks."""
        super().__init__(setting)
        refuse_ranks(self.setting, "its mean of factors stands for one rank")

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """The shifted weights and the mean adapter."""
        updates = train(request).stacked()
        weights = examples(updates)
        rest = others(updates.tensors, weights)
        shared, shift, news = {**state.shared, **rest}, dict(state.shift), dict(rest)
        for layer, pair in pairs(updates.tensors).items():
            x = layer_updates(self.setting, updates, layer, pair, weights)
            mean, missed = split_mean(x, self.setting.scalings[layer])
            shift[layer] = added(shift, layer, missed.product())
            shared[pair.a], shared[pair.b] = mean
            news |= {pair.a: mean.a, pair.b: mean.b, **_smaller(layer, missed)}
        return replace(state, shared=shared, shift=shift, news=news)


def split_mean(x: StackedLora, scaling: float) -> tuple[Factors, Factors]:
    """The mean of the factors, and the residual that completes it."""
    return mean_of_factors(x, scaling=scaling), residual(x, scaling=scaling)


def added(shift: State, layer: str, change: torch.Tensor) -> torch.Tensor:
    """A layer's shift after one more change `[out, in]`."""
    return shift[layer] + change if layer in shift else change


def fresh_factors(setting: Setting, layer: str, like: Factors, request: TrainRequest) -> Factors:
    """An adapter as at the start: A uniform within 1 / sqrt(in), B zero."""
    generator = setting.generator("fresh", request.server_round, layer)
    draws = torch.rand(like.a.shape, generator=generator, dtype=torch.float64)
    bound = like.a.shape[1] ** -0.5
    return Factors(((2 * draws - 1) * bound).to(like.a), torch.zeros_like(like.b))


def _smaller(layer: str, missed: Factors) -> Mapping[str, torch.Tensor]:
    """The residual in factors, or dense where that is less."""
    if missed.a.numel() + missed.b.numel() <= missed.a.shape[1] * missed.b.shape[0]:
        return {f"residual.{layer}.a": missed.a, f"residual.{layer}.b": missed.b}
    return {f"residual.{layer}": missed.product()}
