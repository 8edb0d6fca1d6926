"""Ranks that the server chooses anew, layer by layer, around FedIT or FlexLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from fedclip.federated.strategies.base import (
    Setting,
    Strategy,
    Train,
    examples,
    factors,
    layer_updates,
    others,
    refuse_ranks,
)
from fedclip.federated.strategies.weight_folding import fresh_factors
from fedclip.lora.aggregate import StackedLora, mean_of_factors, stack, truncated_mean
from fedclip.lora.factors import Factors, resize, svd
from fedclip.lora.names import Pair, pairs
from fedclip.lora.rank_budget import Importance, allocate, cubic_budget, importance, is_due
from fedclip.records import RunState, State, TrainRequest


@dataclass(frozen=True)
class RankPlan:
    """When and how ranks change; the fields of `federation.dynamic_ranks`, and the rounds."""

    rounds: int
    schedule: str = "energy"
    energy: float = 0.9
    budget: float = 0.6
    minimum: int = 1
    every: int = 1
    warmup: float = 0.1
    cooldown: float = 0.2
    hysteresis: float = 0.05


class DynamicRanks(Strategy):
    """Each layer at the rank that its update is worth, within a budget for all layers.

    By kept energy (sum of the first k sigma^2 over the sum of all), or by the schedule and scores
    of AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) taken by round; see `federated.ranks`.
    After a round in which ranks may change, the exact mean of every layer is decomposed, its rank
    is chosen (`ranks.allocate`), and the mean is cut there; in the other rounds the factors are
    averaged (fedit) or the mean is cut at the ranks there are (flexlora). The tensors keep the
    model's rank: rows of A and columns of B beyond a layer's rank are zero, get no gradient and are
    not sent, and the scaling stays. Bytes per client and round, up and down: 4 r_l (in + out) for
    each layer of rank r_l.
    """

    def __init__(self, setting: Setting, plan: RankPlan, *, exact: bool) -> None:
        """`exact` cuts the exact mean in every round, as FlexLoRA."""
        super().__init__(setting)
        refuse_ranks(setting, "the server chooses the ranks")
        self._plan = plan
        self._exact = exact

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """The combined updates, at the ranks of the next round."""
        found = pairs(state.shared)
        ranks = layer_ranks(state, found)
        cut = {name: ranks[layer] for layer, pair in found.items() for name in pair}
        updates = train(replace(request, cut=cut)).stacked()
        weights = examples(updates)
        shared, server = {**state.shared, **others(updates.tensors, weights)}, dict(state.server)
        layers = {
            layer: layer_updates(self.setting, updates, layer, pair, weights)
            for layer, pair in pairs(updates.tensors).items()
        }
        plan = self._plan
        due = is_due(
            request.server_round,
            plan.rounds,
            every=plan.every,
            warmup=plan.warmup,
            cooldown=plan.cooldown,
        )
        if due or plan.schedule == "importance":  # which is smoothed over all rounds
            spectra = {layer: svd(stack(x))[1].double() for layer, x in layers.items()}
            server |= self._remember(state, spectra)
        if due:
            sizes = {layer: x.a.shape[1] for layer, x in layers.items()}
            ranks |= self._choose(spectra, ranks, server, sizes, request.server_round)
        for layer, x in layers.items():
            pair, rank = found[layer], ranks[layer]
            cut_now = due or self._exact
            new = self._cut(layer, x, rank, request) if cut_now else self._mean(layer, x)
            shared[pair.a], shared[pair.b] = new
            server[f"rank/{layer}"] = torch.tensor(float(rank), dtype=torch.float64)
        news = {name: shared[name] for name in updates.tensors}
        for layer in layers:
            pair = found[layer]
            news[pair.a], news[pair.b] = resize(factors(shared, pair), ranks[layer])
        return replace(state, shared=shared, server=server, news=news)

    def _choose(
        self,
        spectra: Mapping[str, torch.Tensor],
        ranks: Mapping[str, int],
        server: State,
        sizes: Mapping[str, int],
        server_round: int,
    ) -> dict[str, int]:
        """New ranks by the plan's schedule, for layers whose tensors have room for `sizes`."""
        plan = self._plan
        full = sum(sizes.values())
        if plan.schedule == "importance":
            energy = 1.0
            values = {layer: _remembered(server, layer).scores for layer in spectra}
            budget = cubic_budget(
                server_round / plan.rounds,
                start=full,
                end=plan.budget * full,
                warmup=plan.warmup,
                cooldown=plan.cooldown,
            )
        else:
            energy, budget = plan.energy, plan.budget * full
            values = {layer: s.square() for layer, s in spectra.items()}
        return allocate(
            values,
            energy=energy,
            budget=budget,
            minimum=plan.minimum,
            maximum=sizes,
            previous=ranks,
            hysteresis=plan.hysteresis,
        )

    def _remember(self, state: RunState, spectra: Mapping[str, torch.Tensor]) -> State:
        """What the importance schedule needs to know of this round in the next."""
        if self._plan.schedule != "importance":
            return {}
        memory = {}
        for layer, pair in pairs(state.shared).items():
            if layer in spectra:
                old = factors(state.shared, pair)
                scaled = Factors(old.a, old.b * self.setting.scalings[layer])
                before = svd(scaled)[1].double()
                known = f"importance/{layer}" in state.server
                past = _remembered(state.server, layer) if known else None
                memory[f"importance/{layer}"] = torch.stack(
                    importance(before, spectra[layer], past)
                )
        return memory

    def _mean(self, layer: str, x: StackedLora) -> Factors:
        return mean_of_factors(x, scaling=self.setting.scalings[layer])

    def _cut(self, layer: str, x: StackedLora, rank: int, request: TrainRequest) -> Factors:
        """The mean at a rank, where it has fewer directions with fresh rows of A to grow into."""
        size = x.a.shape[1]
        scaling = self.setting.scalings[layer]
        generator = self.setting.generator("svd", request.server_round, layer)
        new = truncated_mean(x, rank, scaling=scaling, generator=generator)
        whole = resize(new, size)
        empty = whole.b.abs().sum(dim=0) == 0  # [r]
        empty &= torch.arange(size) < rank
        fresh = fresh_factors(self.setting, layer, whole, request)
        return Factors(torch.where(empty[:, None], fresh.a, whole.a), whole.b)


def layer_ranks(state: RunState, found: Mapping[str, Pair]) -> dict[str, int]:
    """The layers' ranks as they are, by layer."""
    ranks = {}
    for layer, pair in found.items():
        kept = state.server.get(f"rank/{layer}")
        ranks[layer] = len(state.shared[pair.a]) if kept is None else int(kept.item())
    return ranks


def _remembered(server: State, layer: str) -> Importance:
    mean, uncertainty = server[f"importance/{layer}"]
    return Importance(mean, uncertainty)
