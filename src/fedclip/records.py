"""What crosses borders: requests to clients, their updates, the record of a round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    import torch

State = Mapping[str, "torch.Tensor"]
"""Tensors by name: what travels, and what an aggregation works on."""


@dataclass(frozen=True)
class RunState:
    """All that the next round needs of the rounds before it.

    `shared` are the trainable tensors that a client starts from. `shift` is by layer the change
    `[out, in]` of a frozen weight, where an algorithm folds updates into it; `server` is the
    server's own memory, and `private` by client id the tensors that never leave it, but for the
    simulation's checkpoint. `news` is the last round's broadcast, where that differs from the
    trained part of `shared`; it is counted and not kept. Where groups of clients have
    adapters of their own, `groups` has their states, sorted by name, and `member_of` each client's
    group; `shared` is then what they started from.
    """

    shared: State
    shift: State = field(default_factory=dict)
    server: State = field(default_factory=dict)
    private: Mapping[str, State] = field(default_factory=dict)
    news: State | None = None
    groups: Mapping[str, RunState] = field(default_factory=dict)
    member_of: Mapping[str, str] = field(default_factory=dict)

    def flat(self) -> dict[str, torch.Tensor]:
        """Everything but the news under one mapping of names, from which `from_flat` reads."""
        flat = {f"shared/{name}": tensor for name, tensor in self.shared.items()}
        flat |= {f"shift/{name}": tensor for name, tensor in self.shift.items()}
        flat |= {f"server/{name}": tensor for name, tensor in self.server.items()}
        for client_id, own in self.private.items():
            flat |= {f"private/{quote(client_id, '')}/{name}": t for name, t in own.items()}
        for group, inner in self.groups.items():
            flat |= {f"group/{quote(group, '')}/{path}": t for path, t in inner.flat().items()}
        if self.member_of:
            import torch  # not before: this module is read by commands that must start at once

            for client_id, group in self.member_of.items():  # told by names alone
                flat[f"member/{quote(client_id, '')}/{quote(group, '')}"] = torch.zeros(0)
        return flat

    @classmethod
    def from_flat(cls, flat: State) -> RunState:
        """A state from what `flat` gave."""
        homes: dict[str, dict[str, torch.Tensor]] = {"shared": {}, "shift": {}, "server": {}}
        private: dict[str, dict[str, torch.Tensor]] = {}
        groups: dict[str, dict[str, torch.Tensor]] = {}
        member_of: dict[str, str] = {}
        for path, tensor in flat.items():
            home, _, name = path.partition("/")
            if home in homes:
                homes[home][name] = tensor
                continue
            owner, _, name = name.partition("/")
            if home == "member":
                member_of[unquote(owner)] = unquote(name)
            else:
                owners = {"private": private, "group": groups}[home]
                owners.setdefault(unquote(owner), {})[name] = tensor
        inner = {group: cls.from_flat(groups[group]) for group in sorted(groups)}
        return cls(**homes, private=private, groups=inner, member_of=member_of)

    def laid_out(self) -> RunState:
        """The same numbers, every tensor laid out in memory as a checkpoint gives it back.

        Products of a transposed or cut view are rounded otherwise than those of a plain tensor.
        """

        def plain(tensors: State) -> dict[str, torch.Tensor]:
            return {name: tensor.contiguous() for name, tensor in tensors.items()}

        return replace(
            self,
            shared=plain(self.shared),
            shift=plain(self.shift),
            server=plain(self.server),
            private={client_id: plain(own) for client_id, own in self.private.items()},
            groups={name: group.laid_out() for name, group in self.groups.items()},
        )

    def group_of(self, client_id: str) -> RunState:
        """The state that a client trains from: its group's, where there are groups."""
        return self.groups.get(self.member_of.get(client_id, ""), self)

    def of(self, client_id: str) -> State:
        """The tensors of a client's personalised model: private ones, else the shared."""
        home = self.group_of(client_id)
        own = home.private.get(client_id, {})
        return {name: own.get(name, tensor) for name, tensor in home.shared.items()}


PLAIN = {"wire": "plain"}
TENSORS = {"wire": "tensors"}
TENSORS_BY_CLIENT = {"wire": "tensors by client"}
"""How a field of a request travels to a site; what has none is sent in a form of its own."""


class StepPlan(Protocol):
    """The optimizer steps of a client in a round, by its number of examples."""

    def most_steps(self, num_examples: int) -> int:
        """How many there are."""
        ...

    def rate(self, share: float) -> float:
        """The learning rate when a share of the round's steps is done; it never rises."""
        ...


@dataclass(frozen=True)
class TrainRequest:
    """What the server asks of a round's clients.

    `state` is the global state they start from; `progress` the share of the run that lies behind,
    in [0, 1), and `round_share` the share that one round takes: learning-rate schedules need both.
    `ranks` tells the LoRA rank of clients that train fewer rows than the state has: they start from
    the first `rank` rows of A and columns of B, at the scaling of that rank; the rest stays zero.

    `trained` names the tensors that are trained and returned, all others stay as they are; None is
    all. `sent` are those of them that leave the client, None again all. By client id, `starts`
    replaces tensors of the state, and `offsets` are added to the gradients. `anchor` is what the
    proximal term pulls to, with weight `proximal_mu`; None are each client's start and the
    configured weight. `shift` changes frozen weights, see `RunState`. Where `frames` names a tensor
    B, what is trained and returned under that name is R `[r, r]`, and B is frame @ R; the state
    then holds R. `start_loss` asks for the loss before training. `cut` is by tensor name the rank
    beyond which a factor is zero, and is not sent. `purpose` is part of the random seed of this
    training pass; draws from a secret also use `digest`, which differs for every other request.

    What an answer is held to: `examples` are the agreed numbers of training examples by client id,
    `plan` the steps that they make, where they are known. `stepped` hears, in any thread, how many
    clients have made a step, each time that an engine of many clients has made one.
    """

    server_round: int
    client_ids: tuple[str, ...]
    state: State
    progress: float = field(default=0.0, metadata=PLAIN)
    round_share: float = field(default=1.0, metadata=PLAIN)
    ranks: Mapping[str, int] = field(default_factory=dict)
    trained: frozenset[str] | None = None
    sent: frozenset[str] | None = None
    starts: Mapping[str, State] = field(default_factory=dict)
    offsets: Mapping[str, State] = field(default_factory=dict, metadata=TENSORS_BY_CLIENT)
    anchor: State | None = field(default=None, metadata=TENSORS)
    proximal_mu: float | None = field(default=None, metadata=PLAIN)
    shift: State = field(default_factory=dict, metadata=TENSORS)
    frames: State = field(default_factory=dict, metadata=TENSORS)
    start_loss: bool = field(default=False, metadata=PLAIN)
    cut: Mapping[str, int] = field(default_factory=dict)
    purpose: str = field(default="client", metadata=PLAIN)
    examples: Mapping[str, int] = field(default_factory=dict)
    plan: StepPlan | None = None
    stepped: Callable[[int], None] | None = None
    digest: str | None = None

    @property
    def names_sent(self) -> frozenset[str]:
        """Names of the tensors that a client trains and uploads."""
        trained = frozenset(self.state) if self.trained is None else self.trained
        return trained if self.sent is None else trained & self.sent

    def of(self, client_id: str) -> TrainRequest:
        """One client's part of the request."""
        return replace(
            self,
            client_ids=(client_id,),
            ranks={c: rank for c, rank in self.ranks.items() if c == client_id},
            starts={c: own for c, own in self.starts.items() if c == client_id},
            offsets={c: own for c, own in self.offsets.items() if c == client_id},
        )

    def start(self, client_id: str) -> State:
        """The tensors that a client starts from."""
        return {**self.state, **self.starts.get(client_id, {})}


@dataclass(frozen=True)
class ClientReport:
    """What a client says about its training, besides the tensors.

    `rate_sum` is the sum of the learning rates of its steps, `start_loss` its loss before training,
    where that was asked for. `weight` is its weight in means, None for its number of examples. A
    site that hides its examples tells no loss (nan), and the `epsilon` that it has spent.
    """

    client_id: str
    num_examples: int
    loss: float
    steps: int
    seconds: float
    rate_sum: float = math.nan
    start_loss: float = math.nan
    weight: float | None = None
    epsilon: float | None = None


@dataclass(frozen=True)
class LeftOut:
    """A client whose answer a round does without: the kind of fault, why, and a figure for it."""

    client_id: str
    kind: str
    reason: str
    figure: float | None = None


@dataclass(frozen=True)
class ClientUpdate:
    """One client's update: its new tensors by name, and its report."""

    report: ClientReport
    tensors: State


@dataclass(frozen=True)
class SecureSum:
    """What comes of a masked sum: the mean of the clients' tensors, and that of their losses."""

    mean: State
    loss: float


@dataclass(frozen=True)
class Cohort:
    """Updates of one or more clients, stacked.

    `tensors` holds one tensor per name with a leading client axis, `[clients, ...]`, in the order
    of `reports`. Values are the clients' new tensors, not differences. `left_out` are clients that
    the engine has heard and not believed. Where updates are masked there is their `total`, and no
    tensors.
    """

    reports: tuple[ClientReport, ...]
    tensors: State
    left_out: tuple[LeftOut, ...] = ()
    total: SecureSum | None = None

    def updates(self) -> Iterator[ClientUpdate]:
        """The clients' updates one by one, as views."""
        for row, report in enumerate(self.reports):
            yield ClientUpdate(report, {n: stacked[row] for n, stacked in self.tensors.items()})

    def rows(self, rows: list[int]) -> Cohort:
        """The updates of some of the clients, in that order; all of them are the cohort itself."""
        if rows == list(range(len(self.reports))):
            return self
        reports = tuple(self.reports[row] for row in rows)
        return Cohort(reports, {n: stacked[rows] for n, stacked in self.tensors.items()})


def plain_json(value: object) -> object:
    """A record as JSON can hold it: a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
