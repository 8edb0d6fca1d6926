"""The round loop: who takes part, what they are asked, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from fedclip.errors import UsageError
from fedclip.federated.local_steps import LocalSettings, RoundPlan
from fedclip.federated.running_mean import Combine
from fedclip.federated.secure.updates import SummedUpdates
from fedclip.federated.strategies.base import Strategy, Train
from fedclip.federated.update_checks import require_finite
from fedclip.federated.updates import Quorum, Updates, tensor_bytes
from fedclip.records import ClientReport, Cohort, LeftOut, RunState, TrainRequest
from fedclip.seeding import seed_for

Sample = Callable[[tuple[str, ...], int], tuple[str, ...]]
"""Draws the clients of a round, by its number, from all of them in their order."""


class Engine(Protocol):
    """Trains the clients of a round, wherever that happens."""

    def train(self, request: TrainRequest) -> Iterator[Cohort]:
        """Yields the updates as they finish, in an order that the request decides."""
        ...


@dataclass(frozen=True)
class RoundResult:
    """A finished round: the new state, what its clients reported, and what travelled.

    `bytes_up` and `bytes_down` are summed over the round's clients. `left_out` are the answers that
    the round did without, `weights` what a guard let clients weigh. `mean_loss` is that of clients
    whose own are hidden. `learning_rate` is that of the clients' first step.
    """

    server_round: int
    state: RunState
    reports: tuple[ClientReport, ...]
    bytes_up: int = 0
    bytes_down: int = 0
    left_out: tuple[LeftOut, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    mean_loss: float | None = None
    learning_rate: float | None = None
    update_norm: float | None = None

    @property
    def loss(self) -> float:
        """Training loss of the round, the clients' means weighted by their examples."""
        if self.mean_loss is not None:
            return self.mean_loss
        total = sum(r.num_examples for r in self.reports)
        if not total:  # nobody was drawn
            return math.nan
        return sum(r.loss * r.num_examples for r in self.reports) / total


def run_rounds(
    state: RunState,
    engine: Engine,
    strategy: Strategy,
    *,
    clients: Mapping[str, int],
    rounds: int,
    clients_per_round: int,
    seed: int,
    finished_rounds: int = 0,
    on_client: Callable[[ClientReport], None] = lambda report: None,
    on_steps: Callable[[int, int], None] | None = None,
    combine: Combine | None = None,
    quorum: Quorum = Quorum(),  # noqa: B008
    settings: LocalSettings | None = None,
    sample: Sample | None = None,
    masked: bool = False,
) -> Iterator[RoundResult]:
    """Yields one result per round, from round `finished_rounds + 1` to `rounds`.

    Where other processes train some of the clients, `combine` sums tensors over all of them; it is
    called once for each time that clients are trained. `on_client` hears of the clients that were
    trained here, `on_steps` of the round's optimizer steps, done and in all, where these are known.
    `sample` draws a round's clients in the place of the seed; it may draw none. `masked` is for an
    engine that gives sums behind masks, and no updates.

    `clients` maps client ids to numbers of training examples. A round depends on the state, the
    seed and its own number only, so a run that starts again at a later round takes the same steps.

    A round goes on without clients whose update cannot be used while there is a `quorum`; with
    `settings`, their steps are held to those. Raises UsageError for a strategy that gives numbers
    that are not finite.
    """
    for server_round in range(finished_rounds + 1, rounds + 1):
        trainings = _Trainings(engine, on_client, combine, quorum, masked)
        if sample is None:
            ids = sample_clients(clients, clients_per_round, server_round, seed)
        else:
            ids = sample(in_order(clients, clients), server_round)
        progress, share = (server_round - 1) / rounds, 1 / rounds
        plan = None if settings is None else RoundPlan(settings, progress, share)
        request = TrainRequest(
            server_round=server_round,
            client_ids=ids,
            state=state.shared,
            progress=progress,
            round_share=share,
            shift=state.shift,
            examples=clients,
            plan=plan,
            stepped=_counted(plan, clients, ids, on_steps),
        )
        # The next round must start from what a resumed run would start from.
        before, state = state, _next_state(strategy, state, request, trainings.train)
        result = trainings.result(server_round, state)
        if ids:
            _require_reports(strategy, result)
        rate = None if plan is None else plan.rate(0.0)
        yield replace(result, learning_rate=rate, update_norm=update_norm(before, state))


def _require_reports(strategy: Strategy, result: RoundResult) -> None:
    """Raise UsageError for a round of a strategy that has had nobody trained."""
    if not result.reports:
        raise UsageError(
            f"federation.strategy: {strategy.title} trained no client in round "
            f"{result.server_round}; its round() must call train, and mean() or stacked() of what "
            "train gives"
        )


def update_norm(before: RunState, after: RunState) -> float | None:
    """L2 norm of the change of the shared tensors, those of all groups together.

    None where a strategy has folded updates into frozen weights and begun the factors anew, or has
    changed their shapes.
    """
    if before.shift or after.shift:
        return None
    squares = 0.0
    groups = after.groups or {"": after}
    for name, state in groups.items():
        start = before.groups.get(name, before)
        for key, tensor in state.shared.items():
            if key not in start.shared or start.shared[key].shape != tensor.shape:
                return None
            change = tensor.double() - start.shared[key].double()
            squares += float(change.square().sum())
    return math.sqrt(squares)


def _counted(
    plan: RoundPlan | None,
    clients: Mapping[str, int],
    ids: Iterable[str],
    on_steps: Callable[[int, int], None] | None,
) -> Callable[[int], None] | None:
    """Adds up what engines tell of their steps; None where nobody hears, or knows how many."""
    if plan is None or on_steps is None:
        return None
    total, done = sum(plan.most_steps(clients[c]) for c in ids), 0

    def stepped(clients: int) -> None:
        nonlocal done
        done = min(total, done + clients)
        on_steps(done, total)

    return stepped


@dataclass
class _Trainings:
    """The trainings that a strategy asks for in one round.

    A second one of the same clients, as Ditto's, is not among the `first`.
    """

    engine: Engine
    on_client: Callable[[ClientReport], None]
    combine: Combine | None
    quorum: Quorum
    masked: bool
    asked: list[Updates] = field(default_factory=list)
    first: list[Updates] = field(default_factory=list)

    def train(self, request: TrainRequest) -> Updates:
        """Train the clients of a request."""
        trained_before = {c for updates in self.first for c in updates.request.client_ids}
        new = trained_before.isdisjoint(request.client_ids)
        hear = self.on_client if new else lambda report: None
        kind = SummedUpdates if self.masked else Updates
        updates = kind(request, self.engine.train(request), self.combine, hear, self.quorum)
        self.asked.append(updates)
        if new:
            self.first.append(updates)
        return updates

    def result(self, server_round: int, state: RunState) -> RoundResult:
        """What the round gave, once its updates are consumed."""
        return RoundResult(
            server_round,
            state,
            tuple(report for updates in self.first for report in updates.reports),
            bytes_up=sum(updates.bytes_up for updates in self.asked),
            bytes_down=sum(bytes_down(state, updates.request) for updates in self.first),
            left_out=tuple(one for updates in self.asked for one in updates.left_out),
            weights={name: own for updates in self.asked for name, own in updates.weights.items()},
            mean_loss=next((u.loss for u in self.first if isinstance(u, SummedUpdates)), None),
        )


def _next_state(
    strategy: Strategy, state: RunState, request: TrainRequest, train: Train
) -> RunState:
    """The strategy's next state, all of it numbers: no update may spoil what is saved."""
    try:
        after = strategy.round(replace(state, news=None), request, train).laid_out()
    except torch.linalg.LinAlgError as error:
        raise UsageError(
            f"round {request.server_round}: {strategy.title} cannot combine the updates: {error}; "
            "the last finished round is kept, and a lower client.learning_rate may help"
        ) from error
    require_finite(after.flat(), strategy.title, request.server_round)
    return after


def bytes_down(state: RunState, request: TrainRequest) -> int:
    """Bytes by which the round's clients learn the new state, those of lower rank their part."""
    if state.groups:
        return sum(
            bytes_down(state.group_of(client_id), replace(request, client_ids=(client_id,)))
            for client_id in request.client_ids
        )
    if state.news is not None:
        return len(request.client_ids) * sum(t.nbytes for t in state.news.values())
    names = request.names_sent & state.shared.keys()
    return sum(
        tensor_bytes(name, state.shared[name], request.ranks.get(client_id))
        for client_id in request.client_ids
        for name in names
    )


def sample_clients(
    clients: Mapping[str, int], count: int, server_round: int, seed: int
) -> tuple[str, ...]:
    """Ids of the round's clients: `count` drawn without replacement, the largest first, then by id.

    The order is the one in which updates are summed; largest first also keeps parallel workers
    busy to the end.
    """
    rng = np.random.default_rng(seed_for(seed, "sample", server_round))
    drawn = rng.choice(sorted(clients), size=count, replace=False)
    return in_order(map(str, drawn), clients)


def in_order(ids: Iterable[str], clients: Mapping[str, int]) -> tuple[str, ...]:
    """Clients by their numbers of examples, the largest first, then by id."""
    return tuple(sorted(ids, key=lambda c: (-clients[c], c)))
