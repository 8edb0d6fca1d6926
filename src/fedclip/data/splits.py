"""Who keeps which example for what: capping a pool, and one client's train/validation/test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class ClientData:
    """One client's examples, as sorted indices into the federation's pixels and labels."""

    client_id: str
    train: Indices
    validation: Indices
    test: Indices


def allocate(sizes: NDArray[np.int64], total: int, at_least: int = 0) -> NDArray[np.int64]:
    """Share `total` out in proportion to `sizes`, whole numbers, none above its size.

    By largest remainders, the first of equals first; every cell that is not empty gets at least
    `at_least` as far as `total` reaches.
    """
    total = min(int(total), int(sizes.sum()))
    if total <= 0:
        return np.zeros_like(sizes)
    exact = sizes * (total / sizes.sum())
    shares = np.minimum(np.maximum(np.floor(exact).astype(np.int64), at_least), sizes)
    while shares.sum() > total:  # the floor of `at_least` took more than there is
        spare = shares > at_least if (shares > at_least).any() else shares > 0
        shares[np.argmax(np.where(spare, shares - exact, -np.inf))] -= 1
    while shares.sum() < total:
        wish = np.where(shares < sizes, exact - shares, -np.inf)
        shares[np.argmax(wish)] += 1
    return shares


def cap(labels: Indices, sites: Indices | None, max_examples: int | None, seed: int) -> Indices:
    """At most `max_examples` positions of `labels`, sorted, drawn evenly over sites and classes."""
    everything = np.arange(len(labels))
    if max_examples is None or max_examples >= len(labels):
        return everything
    rng = np.random.default_rng(seed)
    areas = np.zeros_like(labels) if sites is None else sites
    names, sizes = np.unique(areas, return_counts=True)
    kept = []
    for area, share in zip(names, allocate(sizes, max_examples, at_least=1), strict=True):
        here = rng.permutation(everything[areas == area])
        classes, counts = np.unique(labels[here], return_counts=True)
        for label, count in zip(classes, allocate(counts, int(share)), strict=True):
            kept.append(here[labels[here] == label][:count])
    return np.sort(np.concatenate(kept))


def split(
    indices: Indices,
    labels: Indices,
    groups: Indices | None,
    *,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
) -> tuple[Indices, Indices, Indices]:
    """Train, validation and test parts of `indices`, sorted, in the classes' proportions.

    Sizes are the fractions rounded, so that a client of few examples may have no validation or
    test example, but always a training one. Examples of one group stay together, under the label
    of most of them; sizes are then as near as whole groups come.
    """
    rng = np.random.default_rng(seed)
    units = _units(indices, groups)
    queues: dict[int, list[Indices]] = {}
    for i in rng.permutation(len(units)):
        label = int(np.bincount(labels[units[i]]).argmax())
        queues.setdefault(label, []).append(units[i])
    queues = dict(sorted(queues.items()))
    parts = {
        "test": _take(queues, _rounded(len(indices) * test_fraction)),
        "validation": _take(queues, _rounded(len(indices) * validation_fraction)),
        "train": [unit for queue in queues.values() for unit in queue],
    }
    if not parts["train"]:  # one large group may have taken all
        donor = max(("validation", "test"), key=lambda name: len(parts[name]))
        parts["train"].append(parts[donor].pop())
    train, validation, test = (_join(parts[name]) for name in ("train", "validation", "test"))
    return train, validation, test


def _units(indices: Indices, groups: Indices | None) -> list[Indices]:
    """What must stay together: single examples, or all of a group."""
    if groups is None:
        return list(indices.reshape(-1, 1))
    order = np.argsort(groups[indices], kind="stable")
    _, starts = np.unique(groups[indices][order], return_index=True)
    return np.split(indices[order], starts[1:])


def _take(queues: dict[int, list[Indices]], total: int) -> list[Indices]:
    """Remove about `total` examples, whole units, always from the class that lacks most.

    With single examples this is the method of largest remainders.
    """
    sizes = {label: sum(map(len, queue)) for label, queue in queues.items()}
    share = total / max(1, sum(sizes.values()))
    lacking = {label: size * share for label, size in sizes.items() if size}
    taken: list[Indices] = []
    while total > 0 and lacking:
        label = max(lacking, key=lacking.__getitem__)
        queue = queues[label]
        if not queue or len(queue[0]) >= 2 * total:  # nearer to the total without it
            del lacking[label]
            continue
        taken.append(queue.pop(0))
        total -= len(taken[-1])
        lacking[label] -= len(taken[-1])
    return taken


def _rounded(value: float) -> int:
    """Halves go up, and what is a half but for floating-point error."""
    return int(np.floor(value + 0.5 + 1e-9))


def _join(parts: list[Indices]) -> Indices:
    return np.sort(np.concatenate(parts)) if parts else np.empty(0, dtype=np.int64)
