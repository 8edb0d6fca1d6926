"""Hostile clients of a simulation: who they are, what they tell, and the engine that has them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedclip.config import AttackConfig
from fedclip.config.attack import too_many
from fedclip.errors import FedclipWarning, UsageError
from fedclip.federated.rounds import Engine, in_order
from fedclip.federated.update_checks import BOUNDS
from fedclip.lora.attacks import Attack, Send
from fedclip.lora.names import pairs
from fedclip.records import ClientReport, Cohort, State, TrainRequest
from fedclip.seeding import seed_for


def hostile_clients(attack: AttackConfig, clients: Collection[str], seed: int) -> frozenset[str]:
    """The clients that attack, drawn once for the whole run."""
    if not attack.hostile:
        return frozenset()
    if text := too_many(attack.hostile, len(clients), "the data"):
        raise UsageError(text)
    draw = np.random.default_rng(seed_for(seed, "hostile"))
    return frozenset(map(str, draw.choice(sorted(clients), attack.hostile, replace=False)))


def claimed(examples: Mapping[str, int], hostile: Collection[str], times: float) -> dict[str, int]:
    """Numbers of examples as clients tell them: the hostile ones so many times their own."""
    most = int(BOUNDS["num_examples"].most)
    return {
        c: max(1, min(most, round(times * count))) if c in hostile else count
        for c, count in examples.items()
    }


@dataclass(frozen=True)
class Attacked:
    """An engine some of whose clients are hostile, and know what the honest ones have sent.

    `examples` are the clients' true numbers. What falsifies data needs no change here: the engine
    inside has those data.
    """

    engine: Engine
    attack: Attack
    strength: float
    hostile: frozenset[str]
    examples: Mapping[str, int]
    seed: int

    def train(self, request: TrainRequest) -> Iterator[Cohort]:
        """Yields all updates as one cohort."""
        # The engine inside wants those with most steps first, whatever they claim.
        asked = replace(request, client_ids=in_order(request.client_ids, self.examples))
        cohorts = list(self.engine.train(asked))
        left_out = tuple(one for cohort in cohorts for one in cohort.left_out)
        told = [cohort for cohort in cohorts if cohort.reports]
        if not told:
            yield Cohort((), {}, left_out)
            return
        names = told[0].tensors
        whole = Cohort(
            tuple(report for cohort in told for report in cohort.reports),
            {name: torch.cat([cohort.tensors[name] for cohort in told]) for name in names},
            left_out,
        )
        rows = [n for n, report in enumerate(whole.reports) if report.client_id in self.hostile]
        yield self._falsified(whole, rows, request) if rows else whole

    def _falsified(self, cohort: Cohort, rows: list[int], request: TrainRequest) -> Cohort:
        if self.attack.send is not None:
            draw = np.random.default_rng(
                seed_for(self.seed, "attack", request.purpose, request.server_round)
            )
            sent = _sent(cohort, rows, request, self.attack.send, draw, self.strength)
            return replace(cohort, tensors={**cohort.tensors, **sent})
        if self.attack.falsifies == "factors":
            return replace(cohort, tensors=_gauged(cohort.tensors, rows, request, self.strength))
        if self.attack.falsifies == "examples":
            told = claimed(self.examples, self.hostile, self.strength)
            reports = [replace(r, num_examples=told[r.client_id]) for r in cohort.reports]
            return replace(cohort, reports=tuple(reports))
        return cohort


def _sent(
    cohort: Cohort,
    rows: list[int],
    request: TrainRequest,
    send: Send,
    draw: np.random.Generator,
    strength: float,
) -> State:
    """The tensors that travel, with what the attackers send in their rows."""
    names = sorted(request.names_sent & cohort.tensors.keys())
    starts = {name: _starts(cohort.reports, request, name) for name in names}
    changes = [(cohort.tensors[name].double() - starts[name]).flatten(1) for name in names]
    if not names:
        return {}
    flat = torch.cat(changes, dim=1).numpy()
    others = [n for n in range(len(flat)) if n not in set(rows) and np.isfinite(flat[n]).all()]
    sent = np.array(send(flat[rows], flat[others or rows], draw, strength))
    found = {}
    parts = torch.from_numpy(sent).split([change.shape[1] for change in changes], dim=1)
    for name, part in zip(names, parts, strict=True):
        found[name] = cohort.tensors[name].clone()
        found[name][rows] = (starts[name][rows] + part.view_as(found[name][rows])).to(found[name])
    return found


def _starts(reports: tuple[ClientReport, ...], request: TrainRequest, name: str) -> torch.Tensor:
    """What each client has started from."""
    return torch.stack([request.start(r.client_id)[name].double() for r in reports])


def _gauged(tensors: State, rows: list[int], request: TrainRequest, t: float) -> State:
    """Pairs of which both factors travel as (B t, A / t): the product B A stays as it is."""
    found, sent = dict(tensors), request.names_sent & tensors.keys()
    whole = [pair for pair in pairs(request.state).values() if {pair.a, pair.b} <= sent]
    for name, factor in ((n, f) for pair in whole for n, f in ((pair.b, t), (pair.a, 1 / t))):
        found[name] = tensors[name].clone()
        found[name][rows] *= factor
    if not whole and request.server_round == 1:
        text = "attack.name: gauge does nothing here: (B t, A / t) needs both factors to travel"
        warnings.warn(text, FedclipWarning, stacklevel=2)
    return found
