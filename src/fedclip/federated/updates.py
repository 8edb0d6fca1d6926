"""Client updates of one round, consumed once: as a running mean or stacked.

Whoever wraps `train` can hand on `Guarded` updates, and so decides what a strategy is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from fedclip.errors import TrainingFailed
from fedclip.federated.running_mean import Combine, RunningMean
from fedclip.federated.update_checks import Reason, check, told
from fedclip.lora.names import shape_at_rank
from fedclip.records import ClientReport, Cohort, LeftOut, State, TrainRequest

Weigh = Callable[[ClientReport], float]
Change = Callable[[Cohort], Cohort]


KINDS = ("names", "shape", "dtype", "finite", "range", "examples")
"""Kinds of faults that `check` finds, as processes tell each other by number."""


def by_examples(report: ClientReport) -> float:
    """The usual weight of a client in a mean: its number of examples, or what a guard gave it."""
    return report.num_examples if report.weight is None else report.weight


@dataclass(frozen=True)
class Quorum:
    """How many of a round's clients must send an update that can be used.

    `share` is a number of clients or a share of those asked; `least` are needed in any case.
    """

    share: float = 1.0
    least: int = 1

    def needed(self, asked: int) -> int:
        """How many of those asked."""
        share = self.share
        count = math.ceil(share * asked - 1e-9) if isinstance(share, float) else share
        return max(self.least, min(asked, count))


@dataclass
class Updates:
    """What the clients of a request send, to be taken once, by `mean` or `stacked`.

    `cohorts` come as they finish, and every update is checked before it is taken. A client whose
    update is not finite, or not what was asked for, is `left_out`; TrainingFailed, which names it,
    is raised where those that remain are fewer than the `quorum`. Where other processes train some
    of the clients, `combine` sums tensors over all of them; then `reports` too are those of all
    clients, in the request's order. `bytes_up` counts what was sent, in the tensors' own format.
    """

    request: TrainRequest
    cohorts: Iterable[Cohort]
    combine: Combine | None = None
    on_client: Callable[[ClientReport], None] = lambda report: None
    quorum: Quorum = Quorum()
    reports: list[ClientReport] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)  # that a guard gave, by client
    bytes_up: int = 0
    _changes: list[Change] = field(default_factory=list)

    def apply(self, change: Change) -> None:
        """Has every cohort pass `change`, such as clipping, before a mean or stack takes it in.

        Several are applied in the order given, on the machine that trained the clients.
        """
        self._changes.append(change)

    def mean(self, weigh: Weigh = by_examples) -> dict[str, torch.Tensor]:
        """Mean of the trained tensors, weighted by examples or as `weigh` says.

        Clients are added one by one as they finish, so memory does not grow with their number.
        """
        mean = RunningMean()
        for cohort in self._observed():
            weights = torch.tensor([weigh(r) for r in cohort.reports], dtype=torch.float64)
            mean.add(cohort.tensors, weights)
        if self.combine is not None:
            mean.combine(self._like(), self._with_reports(self.combine))
        return mean.result()

    def stacked(self) -> Cohort:
        """All updates in one cohort, in the order of the request: tensors `[clients, ...]`."""
        cohorts = list(self._observed())
        if self.combine is None:
            names = cohorts[0].tensors
            tensors = {n: torch.cat([c.tensors[n] for c in cohorts]) for n in names}
            return self._in_order(tensors)
        # Everyone fills in the rows of its own clients, and the sum is the whole.
        ids, like = self.request.client_ids, self._like()
        whole = {n: torch.zeros(len(ids), *t.shape, dtype=torch.float64) for n, t in like.items()}
        for cohort in cohorts:
            rows = [ids.index(report.client_id) for report in cohort.reports]
            for name, tensor in cohort.tensors.items():
                whole[name][rows] = tensor.double()
        self._with_reports(self.combine)([whole[name] for name in sorted(whole)])
        here = [row for row, client_id in enumerate(ids) if client_id in self._reported()]
        tensors = {name: whole[name][here].to(tensor.dtype) for name, tensor in like.items()}
        return Cohort(tuple(self.reports), tensors)

    def _in_order(self, tensors: State) -> Cohort:
        """The updates in the order of the request, as clients of several tasks do not come so."""
        places = {report.client_id: row for row, report in enumerate(self.reports)}
        rows = [places[client_id] for client_id in self.request.client_ids if client_id in places]
        if rows != list(range(len(rows))):
            tensors = {name: tensor[rows] for name, tensor in tensors.items()}
            self.reports[:] = [self.reports[row] for row in rows]
        return Cohort(tuple(self.reports), tensors)

    def _observed(self) -> Iterator[Cohort]:
        for whole in self.cohorts:
            self.left_out += whole.left_out
            cohort = whole.rows(list(self._sound(whole)))
            if not cohort.reports:
                continue
            for report in cohort.reports:
                self.reports.append(report)
                self.on_client(report)
                self.bytes_up += self._bytes(cohort.tensors, report.client_id)
            for change in self._changes:
                cohort = change(cohort)
            yield cohort
        if self.combine is None:
            self._require_quorum()

    def _sound(self, cohort: Cohort) -> Iterator[int]:
        """The rows of the updates that may be taken; whose may not is left out."""
        for row, update in enumerate(cohort.updates()):
            reason = check(update, self.request)
            if reason is None:
                yield row
            else:
                self.left_out.append(reason.of(update.report.client_id))

    def _require_quorum(self) -> None:
        asked, number = len(self.request.client_ids), self.request.server_round
        needed = self.quorum.needed(asked)
        if len(self.reports) < needed:
            raise TrainingFailed(
                f"round {number}: {len(self.reports)} of {asked} clients have sent an update that "
                f"can be used, {needed} are needed (deploy.quorum); the last finished round is "
                f"kept. {told(self.left_out, number)}"
            )

    def _reported(self) -> set[str]:
        return {report.client_id for report in self.reports}

    def _bytes(self, tensors: State, client_id: str) -> int:
        sent = self.request.sent
        names = [name for name in tensors if sent is None or name in sent]
        own, cut = self.request.ranks.get(client_id), self.request.cut
        return sum(tensor_bytes(n, tensors[n][0], cut.get(n, own)) for n in names)

    def _like(self) -> State:
        """Names, shapes and formats of one client's update."""
        trained = self.request.trained
        return {n: t for n, t in self.request.state.items() if trained is None or n in trained}

    def _with_reports(self, combine: Combine) -> Combine:
        """Sums the reports and the count of bytes along with the tensors."""

        def combine_all(tensors: list[torch.Tensor]) -> None:
            ids = self.request.client_ids
            table = torch.zeros(len(ids), 7, dtype=torch.float64)  # rows of others stay zero
            for r in self.reports:
                row = [r.num_examples, r.loss, r.steps, r.seconds, r.rate_sum, r.start_loss, 0]
                table[ids.index(r.client_id)] = torch.tensor(row, dtype=torch.float64)
            for one in self.left_out:
                table[ids.index(one.client_id), -1] = 1 + KINDS.index(one.kind)
            sent = torch.tensor([self.bytes_up], dtype=torch.float64)
            combine([*tensors, table, sent])
            self.bytes_up = int(sent.item())
            rows = dict(zip(ids, table.tolist(), strict=True))
            self.reports[:] = [
                ClientReport(client_id, int(row[0]), row[1], int(row[2]), *row[3:6])
                for client_id, row in rows.items()
                if row[0]
            ]
            own = {one.client_id: one for one in self.left_out}
            self.left_out[:] = [
                own.get(client_id) or _elsewhere(KINDS[int(row[-1]) - 1]).of(client_id)
                for client_id, row in rows.items()
                if row[-1]
            ]
            self._require_quorum()

        return combine_all


class Guarded(Updates):
    """Updates behind a guard, which decides what their mean and their stack give.

    This one lets everything through; a subclass overrides `mean` or `stacked`, to add noise, to
    put another rule in the place of the mean, or to refuse by raising UsageError. What has to be
    done to each update comes in by `apply`. Reports and bytes are those of the updates inside, so
    the round's books are right whatever the guard does. Guards may be nested.
    """

    def __init__(self, inner: Updates) -> None:
        """Takes the updates, real or guarded, which nobody has taken yet."""
        self.inner = inner
        self.request = inner.request
        self.reports = inner.reports  # the same ones, which fill as the updates are taken
        self.left_out, self.weights = inner.left_out, inner.weights

    @property
    def bytes_up(self) -> int:
        """What was sent; Scaffold doubles it."""
        return self.inner.bytes_up

    @bytes_up.setter
    def bytes_up(self, count: int) -> None:
        self.inner.bytes_up = count

    def apply(self, change: Change) -> None:
        """Has every cohort pass `change`, after the changes of the guards inside."""
        self.inner.apply(change)

    def mean(self, weigh: Weigh = by_examples) -> dict[str, torch.Tensor]:
        """The mean, as the updates inside give it."""
        return self.inner.mean(weigh)

    def stacked(self) -> Cohort:
        """All updates, as those inside give them."""
        return self.inner.stacked()


class Kept(Guarded):
    """Updates that are stacked and kept, to be taken any number of times."""

    _cohort: Cohort | None = None

    def stacked(self) -> Cohort:
        """All updates, the same ones at every call."""
        if self._cohort is None:
            self._cohort = self.inner.stacked()
        return self._cohort

    def mean(self, weigh: Weigh = by_examples) -> dict[str, torch.Tensor]:
        """The mean of the kept updates."""
        return Updates(self.request, [self.stacked()], quorum=Quorum(1)).mean(weigh)

    def of(self, request: TrainRequest) -> Updates:
        """The kept updates of some of the clients, in the order of `request.client_ids`."""
        whole = self.stacked()
        places = {report.client_id: row for row, report in enumerate(whole.reports)}
        rows = [places[client_id] for client_id in request.client_ids if client_id in places]
        return Updates(request, [whole.rows(rows)], quorum=Quorum(1))


def _elsewhere(kind: str) -> Reason:
    """The reason for a client that another process has left out; its figure stays there."""
    words = "numbers that are not finite (NaN or infinity)" if kind == "finite" else kind
    return Reason(kind, f"sends an update that cannot be used: {words}")


def tensor_bytes(name: str, tensor: torch.Tensor, rank: int | None) -> int:
    """Bytes of a tensor that travels; of a factor only the rows or columns below `rank`."""
    return math.prod(shape_at_rank(name, tuple(tensor.shape), rank)) * tensor.element_size()
