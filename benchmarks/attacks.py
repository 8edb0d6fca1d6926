"""Hostile clients for simulations: what they send in the place of their honest update.

An attack is a function of the round's honest changes `[clients, numbers]`, in float64 and flat, of
which rows are the hostile clients' own; it gives what those send. `Attacked` puts one between an
engine and the round loop. A flipped label is no change of an update: `flipped` changes the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedclip.records import Cohort, TrainRequest
from fedclip.seeding import seed_for

Changes = torch.Tensor
Attack = Callable[[Changes, Sequence[int], torch.Generator], Changes]


def sign_flip(times: float = 5.0) -> Attack:
    """Minus so many times its own change."""
    return lambda changes, rows, draw: -times * changes[rows]


def scaling(times: float = 10.0) -> Attack:
    """So many times its own change."""
    return lambda changes, rows, draw: times * changes[rows]


def gaussian(times: float = 10.0) -> Attack:
    """Noise whose norm is so many times the median norm of the others' changes."""

    def attack(changes: Changes, rows: Sequence[int], draw: torch.Generator) -> Changes:
        noise = torch.randn(len(rows), changes.shape[1], generator=draw, dtype=torch.float64)
        usual = _honest(changes, rows).norm(dim=1).median()
        return noise / noise.norm(dim=1, keepdim=True) * times * usual

    return attack


def alie(z: float = 1.5) -> Attack:
    """The honest mean moved by z standard deviations, number by number.

    "A little is enough", Baruch et al. 2019 (arXiv:1902.06156).
    """

    def attack(changes: Changes, rows: Sequence[int], draw: torch.Generator) -> Changes:
        honest = _honest(changes, rows)
        moved = honest.mean(dim=0) - z * honest.std(dim=0)
        return moved.expand(len(rows), -1)

    return attack


def inner_product(epsilon: float = 0.5) -> Attack:
    """Minus a share of the honest mean: "fall of empires", Xie et al. 2019 (arXiv:1903.03936)."""

    def attack(changes: Changes, rows: Sequence[int], draw: torch.Generator) -> Changes:
        return (-epsilon * _honest(changes, rows).mean(dim=0)).expand(len(rows), -1)

    return attack


def min_max() -> Attack:
    """As far against the honest mean as two honest clients are from each other.

    Shejwalkar and Houmansadr 2021 (NDSS), with the mean's own direction; found by bisection.
    """

    def attack(changes: Changes, rows: Sequence[int], draw: torch.Generator) -> Changes:
        honest = _honest(changes, rows)
        mean = honest.mean(dim=0)
        away = -mean / mean.norm().clamp(min=1e-30)
        most = torch.cdist(honest, honest).max()
        low, high = 0.0, float(2 * most + 2 * mean.norm())
        for _ in range(60):
            gamma = (low + high) / 2
            fits = (honest - (mean + gamma * away)).norm(dim=1).max() <= most
            low, high = (gamma, high) if fits else (low, gamma)
        return (mean + low * away).expand(len(rows), -1)

    return attack


def flipped(labels: Any, classes: int) -> Any:
    """Labels as a hostile client has them: the last class for the first, and so on."""
    return classes - 1 - np.asarray(labels)


class Attacked:
    """An engine some of whose clients attack; they know what the honest ones have sent."""

    def __init__(self, engine: Any, attackers: Sequence[str], attack: Attack, seed: int = 0):
        self._engine, self._attack, self._seed = engine, attack, seed
        self._attackers = frozenset(attackers)

    def train(self, request: TrainRequest) -> Iterator[Cohort]:
        """Yields all updates as one cohort."""
        cohorts = list(self._engine.train(request))
        tensors = {n: torch.cat([c.tensors[n] for c in cohorts]) for n in cohorts[0].tensors}
        reports = tuple(report for cohort in cohorts for report in cohort.reports)
        rows = [row for row, r in enumerate(reports) if r.client_id in self._attackers]
        cohort = Cohort(reports, tensors)
        if rows:
            draw = torch.Generator().manual_seed(
                seed_for(self._seed, "attack", request.server_round)
            )
            cohort = replace(cohort, tensors=self._changed(request, tensors, rows, draw))
        yield cohort

    def _changed(
        self,
        request: TrainRequest,
        tensors: dict[str, torch.Tensor],
        rows: list[int],
        draw: torch.Generator,
    ) -> dict[str, torch.Tensor]:
        start = {name: request.state[name].double() for name in tensors}
        flat = [(tensors[n].double() - start[n]).flatten(1) for n in tensors]
        sent = self._attack(torch.cat(flat, dim=1), rows, draw).split([f.shape[1] for f in flat], 1)
        found = {name: tensor.clone() for name, tensor in tensors.items()}
        for name, own in zip(tensors, sent, strict=True):
            found[name][rows] = (start[name] + own.view(-1, *start[name].shape)).to(found[name])
        return found


def _honest(changes: Changes, rows: Sequence[int]) -> Changes:
    others = [row for row in range(len(changes)) if row not in set(rows)]
    return changes[others]
