"""What a strategy is, and what it knows of the run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from fedclip.catalog import FLAGS, STRATEGIES, StrategyEntry
from fedclip.errors import UsageError
from fedclip.federated.updates import Updates, by_examples
from fedclip.lora.aggregate import StackedLora, gram
from fedclip.lora.factors import Factors
from fedclip.lora.names import Pair, pairs
from fedclip.records import Cohort, RunState, State, TrainRequest
from fedclip.seeding import seed_for

Train = Callable[[TrainRequest], Updates]
"""Has clients trained, and gives what they send."""


Guard = Callable[[Updates], Updates]
"""Puts itself between updates and whoever takes them."""


def guarded(train: Train, guard: Guard) -> Train:
    """The same training, whose updates reach the strategy through a guard (`updates.Guarded`).

    So privacy or a robust rule goes around any strategy, however often it trains:
    `inner.round(state, request, guarded(train, guard))`.
    """
    return lambda request: guard(train(request))


@dataclass(frozen=True)
class Setting:
    """What a strategy knows of the run, besides its state.

    `scalings` are the adapted layers' own, by layer. `ranks` are those of clients that train fewer
    rows than the model has, by client id; `rslora` says that lora_alpha is divided by the root of
    the rank. `options` are the values of the keys that the strategy reads, by their last word.
    """

    seed: int = 0
    scalings: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    rslora: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def generator(self, *names: str | int) -> torch.Generator:
        """Draws of one name, the same in every process and after a resume."""
        return torch.Generator().manual_seed(seed_for(self.seed, *names))


class Strategy(ABC):
    """One round of a federated algorithm, from one state of the run to the next.

    `round` asks for training by `train`, once or more, and takes the updates from what comes back.
    A strategy of your own needs nothing but that method; `examples/custom_strategy.py` is one.

    What may be combined with it are the flags of `fedclip.catalog.StrategyEntry`, as class
    attributes: given in the class, else by its row in the catalogue, else inherited. A class that
    combines updates in another way than the one it extends inherits only `needs_lora`, `personal`.
    """

    needs_lora: ClassVar[bool] = StrategyEntry.needs_lora
    personal: bool = StrategyEntry.personal
    averages: ClassVar[bool] = StrategyEntry.averages
    both_factors: ClassVar[bool] = StrategyEntry.both_factors
    stable_coordinates: ClassVar[bool] = StrategyEntry.stable_coordinates
    steps_in_place: ClassVar[bool] = StrategyEntry.steps_in_place
    mixes_ranks: ClassVar[bool] = StrategyEntry.mixes_ranks
    allows_dora: ClassVar[bool] = StrategyEntry.allows_dora
    masks: ClassVar[bool] = StrategyEntry.masks
    robust_mean: ClassVar[bool] = StrategyEntry.robust_mean
    robust_weights: ClassVar[bool] = StrategyEntry.robust_weights
    options: ClassVar[tuple[str, ...]] = StrategyEntry.options

    def __init_subclass__(cls, **kw: Any) -> None:
        """Fills in the flags that the class does not give itself."""
        super().__init_subclass__(**kw)
        target = f"{cls.__module__}:{cls.__qualname__}"
        row = next((row for row in STRATEGIES.values() if row.target == target), None)
        base = next(c for c in cls.__mro__[1:] if issubclass(c, Strategy))
        combines = row is None and _combines_otherwise(cls, base)
        for flag in {*FLAGS, "options"} - cls.__dict__.keys():
            if row is not None:
                setattr(cls, flag, getattr(row, flag))
            elif combines and flag not in ("needs_lora", "personal", "options"):
                setattr(cls, flag, getattr(StrategyEntry, flag))

    def __init__(self, setting: Setting | None = None) -> None:
        """Takes what is known of the run; the default suits strategies that need none of it."""
        self.setting = setting or Setting()

    @property
    def title(self) -> str:
        """Name of the class that combines the updates, whatever goes around it."""
        inner = getattr(self, "_inner", None)
        return type(self).__name__ if inner is None else str(inner.title)

    @abstractmethod
    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """The next state. `request` is for the round's clients, to be trained from `state`."""

    def asked(self, request: TrainRequest) -> TrainRequest:
        """The request as a strategy that `averages` has it trained."""
        return request


def _combines_otherwise(cls: type[Strategy], base: type[Strategy]) -> bool:
    """Whether a class replaces a method of its base other than `asked`: what is trained."""
    methods = (n for n in dir(base) if callable(getattr(base, n)) and not n.startswith("__"))
    return any(getattr(cls, n) is not getattr(base, n) for n in methods if n != "asked")


def factors(state: State, pair: Pair) -> Factors:
    """One layer's factors."""
    return Factors(state[pair.a], state[pair.b])


def others(tensors: State, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weighted means of the stacked tensors that belong to no factor pair, such as a head's."""
    inside = {name for pair in pairs(tensors).values() for name in pair}
    shares = weights.double() / weights.double().sum()
    return {
        name: torch.tensordot(shares, stacked.double(), dims=1).to(stacked.dtype)
        for name, stacked in tensors.items()
        if name not in inside
    }


def examples(updates: Cohort) -> torch.Tensor:
    """Weights `[clients]`: numbers of examples, or what a guard gave in their place."""
    return torch.tensor([by_examples(r) for r in updates.reports], dtype=torch.float64)


def layer_updates(
    setting: Setting, updates: Cohort, layer: str, pair: Pair, weights: torch.Tensor
) -> StackedLora:
    """One layer's updates, each with the scaling of its client's rank."""
    a, b = updates.tensors[pair.a], updates.tensors[pair.b]
    scalings = [
        client_scaling(setting, layer, a.shape[1], report.client_id) for report in updates.reports
    ]
    return StackedLora(a, b, weights, torch.tensor(scalings, dtype=torch.float64))


def product_gram(
    setting: Setting, start: State, updates: Cohort, frames: State | None = None
) -> torch.Tensor:
    """Inner products `[clients, clients]` of the changes of B A, summed over all layers.

    The change of a layer is s_i B_i A_i - s B_0 A_0 = [s_i B_i, -s B_0] [A_i; A_0], in float64. A
    factor that is not trained is the start's; where `frames` name a B, its core R stands for it.
    """
    clients = len(updates.reports)
    total = torch.zeros(clients, clients, dtype=torch.float64)
    ones = torch.ones(clients, dtype=torch.float64)
    for layer, pair in pairs(start).items():
        if not {*pair} & updates.tensors.keys():
            continue
        a0, b0 = (start[name].double().expand(clients, -1, -1) for name in pair)
        a, b = (
            updates.tensors[name].double() if name in updates.tensors else same
            for name, same in zip(pair, (a0, b0), strict=True)
        )
        if frames and pair.b in frames:
            frame = frames[pair.b].double()
            b, b0 = frame @ b, frame @ b0
        scaling, rank = setting.scalings[layer], a.shape[1]
        own = [client_scaling(setting, layer, rank, r.client_id) / scaling for r in updates.reports]
        b = b * torch.tensor(own, dtype=torch.float64)[:, None, None]
        change = StackedLora(torch.cat([a, a0], 1), torch.cat([b, -b0], 2), ones, ones * scaling)
        total += gram(change)
    return total


def client_scaling(setting: Setting, layer: str, rank: int, client_id: str) -> float:
    """A client's LoRA scaling: lora_alpha over the client's rank.

    `rank` is the layer's; a client has no more than that.
    """
    ratio = rank / min(rank, setting.ranks.get(client_id, rank))
    return setting.scalings[layer] * (math.sqrt(ratio) if setting.rslora else ratio)


def held(setting: Setting, updates: Cohort, rank: int) -> list[int]:
    """The clients' ranks in a layer of that rank, in the order of the updates."""
    return [min(rank, setting.ranks.get(r.client_id, rank)) for r in updates.reports]


def at_client_ranks(setting: Setting, request: TrainRequest) -> TrainRequest:
    """The request for clients of different ranks, who start from the state's first rows.

    B makes up for the client's scaling, so that what it starts from is the state's own product.
    """
    ranks = {c: setting.ranks[c] for c in request.client_ids if c in setting.ranks}
    if not ranks:
        return request
    starts = {client_id: dict(_rescaled(setting, request.state, client_id)) for client_id in ranks}
    return replace(request, ranks=ranks, starts=starts)


def _rescaled(setting: Setting, state: State, client_id: str) -> Iterator[tuple[str, torch.Tensor]]:
    for layer, pair in pairs(state).items():
        own = client_scaling(setting, layer, len(state[pair.a]), client_id)
        yield pair.b, state[pair.b] * (setting.scalings[layer] / own)


def refuse_ranks(setting: Setting, why: str) -> None:
    """Refuses clients of different ranks where an algorithm has no place for them."""
    if setting.ranks:
        raise UsageError(
            f"federation.client_ranks: this strategy cannot mix clients of different ranks, as "
            f"{why}; set federation.strategy to flexlora, hetlora or flora, or leave the ranks out"
        )


def own_starts(state: RunState) -> dict[str, State]:
    """Per-client initial tensors (personalised parameters)."""
    return {
        client_id: {name: tensor for name, tensor in own.items() if name in state.shared}
        for client_id, own in state.private.items()
    }


def kept_by(
    state: RunState, updates: Cohort, names: Iterable[str] | None = None
) -> dict[str, State]:
    """The private tensors after these updates, of which the clients keep those of that name."""
    private = {client_id: dict(own) for client_id, own in state.private.items()}
    for index, report in enumerate(updates.reports):
        own = private.setdefault(report.client_id, {})
        kept = updates.tensors if names is None else names  # a site's own never come here
        own |= {name: updates.tensors[name][index].clone() for name in kept}
    return dict(private)
