"""The round loop: who takes part, what they are asked, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fedclip.federated.aggregation import Combine
from fedclip.federated.strategies import Strategy
from fedclip.records import ClientReport, Cohort, State, TrainRequest
from fedclip.seeding import seed_for


class Engine(Protocol):
    """Trains the clients of a round, wherever that happens."""

    def train(self, request: TrainRequest) -> Iterator[Cohort]:
        """Yields the updates as they finish, in the order of `request.client_ids`."""
        ...


@dataclass(frozen=True)
class RoundResult:
    """A finished round: the new global state and what its clients reported."""

    server_round: int
    state: State
    reports: tuple[ClientReport, ...]

    @property
    def loss(self) -> float:
        """Training loss of the round, the clients' means weighted by their examples."""
        total = sum(r.num_examples for r in self.reports)
        return sum(r.loss * r.num_examples for r in self.reports) / total


def run_rounds(
    state: State,
    engine: Engine,
    strategy: Strategy,
    *,
    clients: Mapping[str, int],
    rounds: int,
    clients_per_round: int,
    seed: int,
    finished_rounds: int = 0,
    on_client: Callable[[ClientReport], None] = lambda report: None,
    combine: Combine | None = None,
) -> Iterator[RoundResult]:
    """Yields one result per round, from round `finished_rounds + 1` to `rounds`.

    Where other processes train some of the clients, `combine` sums tensors over all of them; it is
    called once a round. `on_client` hears of the clients that were trained here.

    `clients` maps client ids to numbers of training examples. A round depends on the state, the
    seed and its own number only, so a run that starts again at a later round takes the same steps.
    """
    for server_round in range(finished_rounds + 1, rounds + 1):
        request = TrainRequest(
            server_round=server_round,
            client_ids=sample_clients(clients, clients_per_round, server_round, seed),
            state=state,
            progress=(server_round - 1) / rounds,
            round_share=1 / rounds,
        )
        reports: list[ClientReport] = []
        cohorts = _observed(engine.train(request), reports, on_client)
        if combine is None:
            state = strategy.fold(state, cohorts)
        else:
            state = strategy.fold(state, cohorts, _with_reports(request, reports, combine))
        yield RoundResult(server_round, state, tuple(reports))


def _with_reports(request: TrainRequest, reports: list[ClientReport], combine: Combine) -> Combine:
    """Sums the reports along with the tensors; `reports` then holds those of all clients."""

    def combine_both(tensors: list[torch.Tensor]) -> None:
        ids = request.client_ids
        table = torch.zeros(len(ids), 4, dtype=torch.float64)  # rows of others' clients stay zero
        for r in reports:
            row = [r.num_examples, r.loss, r.steps, r.seconds]
            table[ids.index(r.client_id)] = torch.tensor(row, dtype=torch.float64)
        combine([*tensors, table])
        reports[:] = [
            ClientReport(client_id, int(examples), loss, int(steps), seconds)
            for client_id, (examples, loss, steps, seconds) in zip(ids, table.tolist(), strict=True)
        ]

    return combine_both


def sample_clients(
    clients: Mapping[str, int], count: int, server_round: int, seed: int
) -> tuple[str, ...]:
    """Ids of the round's clients: `count` drawn without replacement, the largest first, then by id.

    The order is the one in which updates are summed; largest first also keeps parallel workers
    busy to the end.
    """
    rng = np.random.default_rng(seed_for(seed, "sample", server_round))
    drawn = rng.choice(sorted(clients), size=count, replace=False)
    return tuple(sorted((str(c) for c in drawn), key=lambda c: (-clients[c], c)))


def _observed(
    cohorts: Iterable[Cohort],
    reports: list[ClientReport],
    on_client: Callable[[ClientReport], None],
) -> Iterator[Cohort]:
    for cohort in cohorts:
        for report in cohort.reports:
            reports.append(report)
            on_client(report)
        yield cohort
