"""Federated algorithms: how a round's updates are folded into the global state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from fedclip.errors import UsageError
from fedclip.federated.aggregation import Combine, RunningMean
from fedclip.records import Cohort, State


class Strategy(Protocol):
    """Folds the updates of one round into the next global state."""

    def fold(
        self, state: State, cohorts: Iterable[Cohort], combine: Combine | None = None
    ) -> State:
        """The next global state; cohorts come as they finish and need not be kept.

        Where other processes train some of the round's clients, `combine` sums what was summed
        here with theirs; it is to be called once, after the last cohort.
        """
        ...


class FedAvg:
    """Mean of the clients' tensors, weighted by their training examples.

    Applied to LoRA factors it is FedIT (Zhang et al. 2023, arXiv:2305.05644): A and B are averaged
    each on its own, which is not the average of the products BA. Bytes per client and round, up
    and down: 4 * r * (in + out), summed over the adapted layers.
    """

    def fold(
        self, state: State, cohorts: Iterable[Cohort], combine: Combine | None = None
    ) -> State:
        """The weighted mean; of the old state only the shapes are used."""
        mean = RunningMean()
        for cohort in cohorts:
            weights = torch.tensor([r.num_examples for r in cohort.reports], dtype=torch.float64)
            mean.add(cohort.tensors, weights)
        if combine is not None:
            mean.combine(state, combine)
        return mean.result()


def create_strategy(name: str) -> Strategy:
    """The strategy of that name, ready for a run."""
    if name not in STRATEGIES:
        known = ", ".join(sorted(STRATEGIES))
        raise UsageError(f"federation.strategy: unknown strategy {name!r}; known: {known}")
    return STRATEGIES[name]()


STRATEGIES: dict[str, Callable[[], Strategy]] = {"fedavg": FedAvg}
