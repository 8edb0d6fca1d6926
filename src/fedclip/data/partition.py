"""Labels to index lists per client, as flwr-datasets' partitioners make them."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclip.errors import UsageError
from fedclip.seeding import seed_for

Indices = NDArray[np.int64]

DIRICHLET_SEEDS = 1000
DRAWS_PER_SEED = 11  # flwr-datasets raises after the eleventh


def partition(
    labels: Indices,
    name: str,
    num_clients: int,
    seed: int,
    *,
    sites: Indices | None = None,
    groups: Indices | None = None,
    alpha: float = 0.5,
    min_size: int = 2,
    classes_per_client: int = 2,
    shards_per_client: int = 2,
    size_skew: str = "linear",
) -> list[Indices]:
    """Index lists, one per client, each sorted: disjoint parts of `range(len(labels))`.

    They are what flwr-datasets makes of the shuffled rows, as its FederatedDataset does it, with
    `partition_seed(seed)` for both draws. A Dirichlet draw that leaves a client below `min_size`
    is repeated with the next seed, `partition_seed(seed) + 1`, and so on, up to DIRICHLET_SEEDS.
    `shard` drops the few examples that fill no shard, `pathological` the classes that no client
    was given; the others use every example. `natural` makes each site of `sites` a client, in
    ascending order, and takes no notice of `num_clients`. Examples of one group go to one client:
    the division is then made over groups, each under its first example's label.
    """
    if name not in _PARTITIONERS and name != "natural":
        known = ", ".join([*_PARTITIONERS, "natural"])
        raise UsageError(f"data.partition.name must be one of {known}, got {name!r}")
    if name == "natural":
        require_sites(sites)
        units, members = labels, None
    else:
        units, members = (labels, None) if groups is None else _one_per_group(labels, groups)
        at_least = min_size if name == "dirichlet" else 1
        _check(units, name, num_clients, at_least, classes_per_client, shards_per_client)
    options_of: dict[str, dict[str, Any]] = {
        "dirichlet": {"alpha": float(alpha), "min_partition_size": min_size},
        "pathological": {"num_classes_per_partition": classes_per_client},
        "shard": {"num_shards_per_partition": shards_per_client},
        "size": {"skew": size_skew},
    }
    parts = _divide(units, sites, name, num_clients, partition_seed(seed), options_of.get(name, {}))
    if members is not None:
        parts = [np.concatenate([members[unit] for unit in part]) for part in parts]
    return [np.sort(part) for part in parts]


def require_sites(sites: Indices | None) -> None:
    """Refuse the natural partition of a data set that knows no sites."""
    if sites is None:
        raise UsageError(
            "data.partition.name: natural needs a data set with sites (icons, or a folder "
            "<site>/<class>/*); choose dirichlet or iid for this one"
        )


def partition_seed(seed: int) -> int:
    """The run's seed for partitions, in the 32 bits that flwr-datasets takes."""
    return seed_for(seed, "partition") % 2**32


def _one_per_group(labels: Indices, groups: Indices) -> tuple[Indices, list[Indices]]:
    """Labels of the groups' first examples, and each group's examples, by first appearance."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    by_group = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse))[:-1])
    order = np.argsort(first)
    return labels[first[order]], [by_group[i] for i in order]


def _check(
    labels: Indices,
    name: str,
    num_clients: int,
    at_least: int,
    classes_per_client: int,
    shards_per_client: int,
) -> None:
    """Refuse what cannot work before it is tried."""
    num_examples, num_classes = len(labels), len(np.unique(labels))
    if num_clients > num_examples:
        raise UsageError(
            f"federation.num_clients: {num_examples} training examples cannot be divided over "
            f"{num_clients} clients; lower federation.num_clients or use more data"
        )
    if num_clients * at_least > num_examples:
        raise UsageError(
            f"data.partition.min_size: {num_examples} training examples cannot give "
            f"{num_clients} clients {at_least} each; lower data.partition.min_size or "
            "federation.num_clients, or use more data"
        )
    if name == "pathological" and classes_per_client > num_classes:
        raise UsageError(
            f"data.partition.classes_per_client: at most the {num_classes} classes that the "
            f"training data has, got {classes_per_client}"
        )
    if name == "shard" and num_clients * shards_per_client > num_examples:
        raise UsageError(
            f"data.partition.shards_per_client: {num_clients} clients with {shards_per_client} "
            f"shards each need {num_clients * shards_per_client} training examples, there are "
            f"{num_examples}; lower it or federation.num_clients"
        )


def _divide(
    labels: Indices,
    sites: Indices | None,
    name: str,
    num_clients: int,
    seed: int,
    options: dict[str, Any],
) -> list[Indices]:
    """The parts that flwr-datasets makes of the rows, shuffled by the same seed.

    The usual ones are worked out here, index for index the same: loading flwr-datasets and datasets
    takes longer than a small data set's first round.
    """
    if name == "natural" and sites is not None:
        return [np.flatnonzero(sites == site) for site in np.unique(sites)]
    counts = np.unique(labels, return_counts=True)[1]
    ends = None
    if name == "dirichlet":
        found = _dirichlet_draw(counts, num_clients, seed, **options)
        if found is None:
            raise UsageError(_remedy(name, num_clients, len(labels), options, ""))
        seed, ends = found
    # What Dataset.shuffle(seed) does, but in memory order: the partitioners read row by row.
    order = np.random.default_rng(seed).permutation(len(labels))
    if name == "iid":
        return np.array_split(order, num_clients)
    if ends is not None:
        rows = [order[labels[order] == label] for label in np.unique(labels)]
        divided = [np.split(row, end[:-1]) for row, end in zip(rows, ends, strict=True)]
        return [np.concatenate(parts) for parts in zip(*divided, strict=True)]
    return _by_flwr_datasets(labels, order, name, num_clients, seed, options)


def _dirichlet_draw(
    counts: Indices, num_clients: int, seed: int, *, alpha: float, min_partition_size: int
) -> tuple[int, Indices] | None:
    """The first of the seeds whose draws give every client enough, and where its parts end.

    Repeats DirichletPartitioner's draws, one per class, and its sizes; it gives up on a seed after
    eleven.
    """
    concentration = np.full(num_clients, alpha)
    for attempt in range(DIRICHLET_SEEDS):
        rng = np.random.default_rng((seed + attempt) % 2**32)
        for _ in range(DRAWS_PER_SEED):
            shares = np.cumsum(rng.dirichlet(concentration, size=len(counts)), axis=1)
            ends = (shares * counts[:, None]).astype(np.int64)  # [classes, clients]
            ends[:, -1] = counts
            if np.diff(ends, axis=1, prepend=0).sum(axis=0).min() >= min_partition_size:
                return (seed + attempt) % 2**32, ends
    return None


def _by_flwr_datasets(
    labels: Indices,
    order: Indices,
    name: str,
    num_clients: int,
    seed: int,
    options: dict[str, Any],
) -> list[Indices]:
    with _quiet():
        import datasets

        partitioner = _create(name, num_clients, seed, options)
        columns = {"index": order, "label": labels[order]}
        partitioner.dataset = datasets.Dataset.from_dict(columns)
        try:
            count = partitioner.num_partitions
            parts = [partitioner.load_partition(number) for number in range(count)]
        except ValueError as error:
            reason = str(error)
            raise UsageError(_remedy(name, num_clients, len(labels), options, reason)) from error
    return [part.with_format("numpy")[:]["index"].astype(np.int64) for part in parts]


def _create(name: str, num_clients: int, seed: int, options: dict[str, Any]) -> Any:
    from flwr_datasets import partitioner

    if name == "size":
        return getattr(partitioner, _SKEWS[options["skew"]])(num_clients)
    if name == "pathological":
        # As in Li et al. (2022): every class has a client as long as there are clients enough.
        options = options | {"class_assignment_mode": "first-deterministic"}
    kind = getattr(partitioner, _PARTITIONERS[name])
    return kind(num_partitions=num_clients, partition_by="label", seed=seed, **options)


def _remedy(
    name: str, num_clients: int, num_examples: int, options: dict[str, Any], reason: str
) -> str:
    what = f"{num_examples} training examples over {num_clients} clients"
    if name == "dirichlet":
        return (
            f"data.partition.min_size: no Dirichlet draw with alpha {options['alpha']} of "
            f"{DIRICHLET_SEEDS} seeds gave each client {options['min_partition_size']} examples "
            f"({what}); lower data.partition.min_size or federation.num_clients, or raise "
            "data.partition.alpha"
        )
    if name == "pathological":
        return (
            f"data.partition.classes_per_client: with {options['num_classes_per_partition']} a "
            f"client, a class has fewer examples than clients that need it ({what}); lower it or "
            "federation.num_clients, or use more data"
        )
    if name == "size":
        return (
            f"data.partition.size_skew: {options['skew']} leaves the smallest client without "
            f"examples ({what}); choose linear, lower federation.num_clients, or use more data"
        )
    return f"data.partition: {name} cannot divide {what}: {reason}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep flwr-datasets silent: no telemetry, no progress bars, no advice."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read once, at its first import
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


_SKEWS = {
    "linear": "LinearPartitioner",
    "square": "SquarePartitioner",
    "exponential": "ExponentialPartitioner",
}
_PARTITIONERS = {
    "iid": "worked out here",
    "dirichlet": "worked out here",
    "pathological": "PathologicalPartitioner",
    "shard": "ShardPartitioner",
    "size": "by data.partition.size_skew",
}
