"""Registry of every name a configuration may use: where its code is, what it composes with.

A name is one of the rows below, else an entry point of an installed package in the group
`fedclip.<kind>`, else `path/to/file.py:Name`, else what Python hands over. Nothing is imported
here: `fedclip.config.lookup` loads what a name stands for.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

_ALGORITHMS, _BYTES = "fedclip.federated.strategies", "fedclip.federated.traffic"
_SOURCES = "fedclip.data.sources"


@dataclass(frozen=True)
class Entry:
    """A row: `target` is `module:Name`."""

    target: str


@dataclass(frozen=True)
class StrategyEntry(Entry):
    """A strategy, and what may be combined with it; a user's class says more by `FLAGS`."""

    needs_lora: bool = True  # combines LoRA factors: no full fine-tuning
    personal: bool = False  # every client ends with a model of its own
    averages: bool = False  # the mean, by examples, of what `asked` has trained: scaffold, clusters
    both_factors: bool = False  # averages A and B in every round: adapters shared in part
    stable_coordinates: bool = False  # factors keep their meaning between rounds: Ditto
    steps_in_place: bool = False  # proposes tensors in the old ones' coordinates: server optimizers
    mixes_ranks: bool = False  # takes clients of different ranks
    allows_dora: bool = False  # does not need B A to be the whole update
    masks: bool = False  # takes nothing but the mean by examples: secure aggregation
    robust_mean: bool = False  # `mean` of one factor that all share: any robust rule
    robust_weights: bool = False  # weighs products B A by `num_examples`: rules that weigh
    reads_losses: bool = False  # reads clients' exact losses: no privacy of examples
    options: tuple[str, ...] = ()  # keys of the configuration that it reads
    dynamic_ranks: str = ""  # what the server's ranks cut: the factors' "mean", or "product"
    pools: bool = False  # one client holds all examples
    traffic: str = f"{_BYTES}:both"  # formula of its bytes per round


FLAGS = (*(f.name for f in fields(StrategyEntry) if f.type == "bool" and f.name != "pools"),)
"""What a user's class may say of itself, as class attributes; and `options`, likewise."""


@dataclass(frozen=True)
class DataSetEntry(Entry):
    """A data set: a function of a path (or None) and a layout that returns an `ImageSource`."""

    path: str = ""  # what `data.path` must name; "" where the data set needs none
    sites: bool = False  # may come with sites, whose number then stands in for `num_clients`
    captioned: bool = False  # captions in the place of classes


@dataclass(frozen=True)
class EngineEntry(Entry):
    """An engine: a function of a run's parts and what all engines take that returns an engine."""

    stacks: bool = False  # many clients in one pass: LoRA without captions or DoRA


def _strategy(target: str, traffic: str = "both", **flags: Any) -> StrategyEntry:
    return StrategyEntry(f"{_ALGORITHMS}.{target}", traffic=f"{_BYTES}:{traffic}", **flags)


# A mean of tensors, one by one, in coordinates that all clients share.
_PLAIN = ("averages", "stable_coordinates", "steps_in_place", "allows_dora", "masks")
_MEAN: Any = dict.fromkeys(_PLAIN, True)
_BOTH: Any = {"both_factors": True, "dynamic_ranks": "mean"}

# fmt: off
STRATEGIES: dict[str, StrategyEntry] = {
    "fedavg": _strategy("averaging:FedAvg", needs_lora=False, **_MEAN, **_BOTH),
    "fedit": _strategy("averaging:FedIT", **_MEAN, **_BOTH),
    "ffa": _strategy("averaging:FFA", "only_b", **_MEAN, robust_mean=True),
    "rolora": _strategy("averaging:RoLoRA", "in_turns", **_MEAN, robust_mean=True),
    "fedsa": _strategy("averaging:FedSA", "only_a", personal=True, steps_in_place=True,
                       allows_dora=True),
    "flora": _strategy("weight_folding:FLoRA", "stacked", mixes_ranks=True, robust_weights=True),
    "flexlora": _strategy("product_space:FlexLoRA", mixes_ranks=True, robust_weights=True,
                          dynamic_ranks="product", options=("federation.average_owners",)),
    "hetlora": _strategy("product_space:HetLoRA", mixes_ranks=True,
                         options=("federation.average_owners", "federation.order_rows")),
    "fedex": _strategy("weight_folding:FedEx", "mean_and_residual"),
    "fedsvd": _strategy("product_space:FedSVD", "b_up_both_down", robust_mean=True, masks=True),
    "lora_fair": _strategy("product_space:LoraFair", stable_coordinates=True, steps_in_place=True,
                           options=("federation.ridge",)),
    "fed_sb": _strategy("fed_sb:FedSB", "cores", robust_mean=True),
    "qfedavg": _strategy("averaging:QFedAvg", needs_lora=False, stable_coordinates=True,
                         allows_dora=True, reads_losses=True, options=("federation.q",)),
    "local": _strategy("averaging:LocalOnly", "nothing", needs_lora=False, personal=True,
                       allows_dora=True),
    # One client that holds all images: FedAvg of one is that client.
    "centralised": _strategy("averaging:FedAvg", needs_lora=False, allows_dora=True, pools=True),
}
# fmt: on

ELSEWHERE = {
    "fedprox": "client.proximal_mu, such as 0.01,",
    "scaffold": "federation.scaffold: true",
    "ditto": "federation.ditto_mu, such as 0.1,",
    "fedavgm": "federation.server_optimizer.name: avgm",
    "fedopt": "federation.server_optimizer.name, such as adam,",
    "fedadam": "federation.server_optimizer.name: adam",
    "fedyogi": "federation.server_optimizer.name: yogi",
    "fedadagrad": "federation.server_optimizer.name: adagrad",
    "krum": "robust.rule: krum",
    "dpfedavg": "privacy.unit: client",
}
"""What others call strategies and here is a key of its own, by its name without - and _."""

DATA_SETS: dict[str, DataSetEntry] = {
    "digits": DataSetEntry(f"{_SOURCES}.builtin:digits"),
    "fashion_mnist": DataSetEntry(f"{_SOURCES}.builtin:fashion_mnist"),
    "icons": DataSetEntry(f"{_SOURCES}.builtin:icons", sites=True),
    "imagefolder": DataSetEntry(
        f"{_SOURCES}.imagefolder:imagefolder", path="the folder of images", sites=True
    ),
    "hub": DataSetEntry(f"{_SOURCES}.hub:hub", path="a hub id or a local path", sites=True),
    "pairs": DataSetEntry(
        f"{_SOURCES}.pairs:pairs",
        path="the table of images and captions",
        sites=True,
        captioned=True,
    ),
}

ENGINES: dict[str, EngineEntry] = {
    "batched": EngineEntry("fedclip.experiment.engine:batched", stacks=True),
    "sequential": EngineEntry("fedclip.experiment.engine:sequential"),
}

SERVER_OPTIMIZERS: dict[str, Entry] = {
    name: Entry(f"{_ALGORITHMS}.server_optimizers:{name}")
    for name in ("avgm", "adam", "yogi", "adagrad")
}

TRACKERS: dict[str, Entry] = {
    name.lower(): Entry(f"fedclip.reports.trackers.{name.lower()}:{name}")
    for name in ("TensorBoard", "WandB", "MLflow")
}

MERGE_METHODS: dict[str, Entry] = {
    name: Entry(f"fedclip.lora.merge_methods:{name.upper().replace('-', '_')}")
    for name in ("linear", "cat", "svd", "task-arithmetic", "ties", "dare", "knots")
}


@dataclass(frozen=True)
class Kind:
    """Names of one sort."""

    rows: Mapping[str, Entry]
    key: str  # where a configuration gives one
    word: str = "function"  # what one stands for
    opens: bool = True  # whether names from elsewhere than the rows are taken
    table: str = ""  # where further rows are, a function each: `module:NAME` of a dictionary


KINDS = {
    "strategies": Kind(STRATEGIES, "federation.strategy", "class"),
    "data_sets": Kind(DATA_SETS, "data.name"),
    "engines": Kind(ENGINES, "engine.name"),
    "robust_rules": Kind({}, "robust.rule", table="fedclip.lora.robust_rules:RULES"),
    "attacks": Kind({}, "attack.name", opens=False, table="fedclip.lora.attacks:ATTACKS"),
    "trackers": Kind(TRACKERS, "tracking", "class"),
    "metrics": Kind({}, "evaluation.metrics", table="fedclip.evaluation.metrics:METRICS"),
    "server_optimizers": Kind(SERVER_OPTIMIZERS, "federation.server_optimizer.name", opens=False),
    "merge_methods": Kind(MERGE_METHODS, "method", opens=False),
}


GIVEN = "given"
"""The name of data handed over in Python; of a class `given:Name`."""


def is_given(kind: str, name: str) -> bool:
    """Whether a name of this kind stands for an object handed over in Python."""
    return kind in ("data_sets", "strategies") and bool(re.fullmatch(rf"{GIVEN}(:\w+)?", name))


def in_file(name: str) -> bool:
    """Whether a name is `path/to/file.py:Name`."""
    return re.fullmatch(r".+\.py:\w+", name) is not None


def short_name(name: str) -> str:
    """A name without the folders of this machine; for a class `given`, the class's name."""
    return name.rpartition(":")[2] if in_file(name) or is_given("strategies", name) else name


def unknown(
    kind: str, name: str, also: Sequence[str] = (), without: str = ""
) -> tuple[str, str] | None:
    """What a name should be, and a hint at the nearest; None of a known one, not yet imported.

    The names of `also` are right too, and no row's of which the field `without` holds.
    """
    rows = [*also, *rows_without(kind, without)]
    if name in rows or is_given(kind, name) or (KINDS[kind].opens and in_file(name)):
        return None
    known = [*rows, *sorted(installed(kind).keys() - KINDS[kind].rows.keys())]
    if name in known:
        return None
    plain = {re.sub(r"[-_ ]", "", other).casefold(): other for other in known}
    if kind == "strategies" and (other := ELSEWHERE.get(re.sub(r"[-_ ]", "", name).casefold())):
        return choices(kind, known), f"; that is {other} here, around any strategy"
    near = difflib.get_close_matches(re.sub(r"[-_ ]", "", name).casefold(), plain, n=1)
    return choices(kind, known), f"; did you mean {plain[near[0]]}?" if near else ""


def rows_without(kind: str, field: str = "") -> list[str]:
    """The names of a kind's rows of which a field does not hold."""
    rows = KINDS[kind].rows.items()
    return [*(n for n, row in rows if not (field and getattr(row, field))), *own_rows(kind)]


def own_rows(kind: str) -> Mapping[str, Any]:
    """The functions of a kind whose rows stand beside their code, which is free of torch."""
    where = KINDS[kind].table
    return target_of(where) if where else {}


def choices(kind: str, known: Sequence[str]) -> str:
    """The names of a kind in words: `one of fedavg, ..., or path/to/file.py:Name`."""
    return f"one of {', '.join(known)}" + ", or path/to/file.py:Name" * KINDS[kind].opens


def installed(kind: str) -> dict[str, list[Any]]:
    """Entry points of installed packages for a kind, by name; `load` refuses a name of two."""
    from importlib.metadata import entry_points  # slow to import

    found: dict[str, list[Any]] = {}
    for point in entry_points(group=f"fedclip.{kind}") if KINDS[kind].opens else ():
        found.setdefault(point.name, []).append(point)
    return found


def target_of(target: str) -> Any:
    """The object at `module:Name`, of this package."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def strategy_row(name: str) -> StrategyEntry:
    """A strategy's row; of one that has none, the defaults, without importing it."""
    return STRATEGIES.get(name) or StrategyEntry(name)
