"""What a group of clients has to do in one round, for whoever carries it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedclip.federated.engines.gradient_terms import GradientTerms
from fedclip.federated.engines.protocols import Stacked
from fedclip.federated.engines.stack import Group
from fedclip.federated.local_steps import LocalSettings, plan_steps
from fedclip.federated.privacy.dp_sgd import ClientDpSgd, DpSgd
from fedclip.records import ClientReport, TrainRequest
from fedclip.seeding import seed_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

Plan = list[list["NDArray[np.int64]"]]
"""A client's micro-batches of example indices, by step."""


@dataclass(frozen=True)
class Work:
    """The clients of a group, those with most steps first.

    `rates` has the learning rates of each step, `[active]`; `terms` are added to the gradients.
    `private` has each client's DP-SGD, where examples are kept private.
    """

    group: Group
    plans: list[Plan]
    seeds: list[int]
    rates: list[torch.Tensor]
    terms: GradientTerms
    scales: torch.Tensor | None = None
    private: list[ClientDpSgd] | None = None
    stepped: Callable[[int], None] = lambda clients: None

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        request: TrainRequest,
        clients: Mapping[str, NDArray[np.int64]],
        settings: LocalSettings,
        model: Stacked,
        *,
        seed: int,
        device: torch.device,
        private: DpSgd | None = None,
    ) -> Work:
        """Where these clients start, and all that they will do; `clients` has everyone's data."""
        seeds = [seed_for(seed, request.purpose, request.server_round, c) for c in ids]
        own = None if private is None else [private.of(c, request) for c in ids]
        if own is None:
            plans = [
                list(plan_steps(clients[c], settings, s)) for c, s in zip(ids, seeds, strict=True)
            ]
        else:
            epochs = settings.local_epochs
            plans = [p.plan(clients[c], epochs) for c, p in zip(ids, own, strict=True)]
        group = Group.of(ids, request, model.trained, device)
        return cls(
            group,
            plans,
            seeds,
            _rates(request, settings, [len(plan) for plan in plans]),
            GradientTerms.of(request, ids, settings, group.parameters),
            scales=None if group.ranks is None else model.scales(group.ranks),
            private=own,
            stepped=request.stepped or (lambda clients: None),
        )

    def active(self, step: int) -> list[list[NDArray[np.int64]]]:
        """Micro-batches of the clients active in this step: the first ones, with most steps."""
        return [plan[step] for plan in self.plans if len(plan) > step]

    def rate_sums(self) -> list[float]:
        """The sum of each client's learning rates."""
        sums = torch.zeros(len(self.plans), dtype=torch.float64)
        for rates in self.rates:
            sums[: len(rates)] += rates
        return sums.tolist()

    def reports(
        self,
        ids: Sequence[str],
        examples: Sequence[int],
        losses: Sequence[float],
        before: Sequence[float],
        seconds: float,
    ) -> tuple[ClientReport, ...]:
        """What the clients report; the group's time is shared out by the steps that each took."""
        reports, all_steps = [], sum(map(len, self.plans))
        rows = zip(ids, examples, losses, self.plans, self.rate_sums(), before, strict=True)
        for client_id, count, total, plan, rate_sum, start in rows:
            loss = total / max(1, sum(len(batch) for batches in plan for batch in batches))
            own = seconds * (len(plan) / all_steps)
            reports.append(ClientReport(client_id, count, loss, len(plan), own, rate_sum, start))
        return tuple(reports)


def _rates(
    request: TrainRequest, settings: LocalSettings, lengths: list[int]
) -> list[torch.Tensor]:
    """By step the learning rates of those clients, of so many steps each, that take it."""
    found = []
    for step in range(lengths[0]):
        rates = [
            settings.rate(request.progress + request.round_share * step / total)
            for total in lengths
            if total > step
        ]
        found.append(torch.tensor(rates, dtype=torch.float64))
    return found


@dataclass(frozen=True)
class MicroStep:
    """One pass with static shapes: `size` clients of `rows` rows each, of whom some may be idle.

    `batches` are the micro-batches of those that take part, and `indices` `[size * rows]` what is
    shown: padding repeats examples of the group. `weights` `[size * rows]` are the rows' in their
    client's mean loss, 0 for padding. `last` ends an optimizer step.
    """

    step: int
    part: int
    size: int
    rows: int
    last: bool
    batches: list[NDArray[np.int64]]
    indices: NDArray[np.int64]
    weights: NDArray[np.float64]
    keys: list[int]


def micro_steps(work: Work, sizes: Sequence[int], widths: Sequence[int]) -> Iterator[MicroStep]:
    """A group's work in passes of a few shapes: each takes the least size and width that hold it.

    The numbers fall: the first size is that of the largest group, the first width of the largest
    batch.
    """
    for step in range(len(work.plans[0])):
        own = work.active(step)
        parts = max(map(len, own))
        size = _least(sizes, len(own))
        totals = [sum(map(len, batches)) for batches in own]
        for part in range(parts):
            shown = [b[part] if part < len(b) else b[0][:0] for b in own]
            rows = _least(widths, max(map(len, shown)))
            indices = np.full((size, rows), own[0][0][0])
            weights = np.zeros((size, rows))
            for k, batch in enumerate(shown):
                indices[k] = own[k][0][0]
                indices[k, : len(batch)] = batch
                weights[k, : len(batch)] = 1 / totals[k]
            keys = [seed_for(seed, "dropout", step, part) for seed in work.seeds[: len(own)]]
            yield MicroStep(
                step,
                part,
                size,
                rows,
                part == parts - 1,
                shown,
                indices.ravel(),
                weights.ravel(),
                keys + [0] * (size - len(keys)),
            )


def halves(number: int, by: int = 2) -> tuple[int, ...]:
    """The number, its half, the half's half and so on, rounded up, to 1."""
    found = [number]
    while found[-1] > 1:
        found.append(-(-found[-1] // by))
    return tuple(found)


def _least(numbers: Sequence[int], wanted: int) -> int:
    return min(number for number in numbers if number >= wanted)
