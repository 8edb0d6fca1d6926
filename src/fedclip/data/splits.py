"""Who keeps which example for what: capping a pool, and one client's train/validation/test.

All numbers are rounded at random, so that over many clients every class is held out in the
fraction asked for, whatever its number or name (`data.rounding`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from fedclip.data.rounding import round_row, round_table, spread

Indices = NDArray[np.int64]

SPLIT_RULE = 2
"""Version of the rule by which examples are held out; `partition.json` says which one was used.

1: largest remainders, of equals the lowest class first, at every client. 2: randomised rounding.
"""


@dataclass(frozen=True)
class ClientData:
    """One client's examples, as sorted indices into the federation's pixels and labels."""

    client_id: str
    train: Indices
    validation: Indices
    test: Indices


@dataclass(frozen=True)
class Unit:
    """Examples that stay together: one, or all of a group. `key` is its place in a random order."""

    rows: Indices
    label: int
    key: int


def allocate(
    sizes: NDArray[np.int64], total: int, rng: np.random.Generator, at_least: int = 0
) -> NDArray[np.int64]:
    """Share `total` out in proportion to `sizes`, whole numbers, none above its size.

    Each share is one of the two neighbours of its exact value, which is its expected value. Every
    cell that is not empty gets `at_least`, as far as `total` reaches for all of them.
    """
    total = min(int(total), int(sizes.sum()))
    if total <= 0:
        return np.zeros_like(sizes)
    least = np.minimum(sizes, at_least)
    exact = sizes * (total / sizes.sum())
    if least.sum() <= total:
        fixed = np.zeros(len(sizes), dtype=bool)
        while (short := ~fixed & (exact < least)).any():
            fixed |= short
            left = total - least[fixed].sum()
            free = np.where(fixed, 0, sizes)
            exact = np.where(fixed, least, free * (left / max(1, free.sum())))
    return round_row(exact, total, rng)


def cap(labels: Indices, sites: Indices | None, max_examples: int | None, seed: int) -> Indices:
    """At most `max_examples` positions of `labels`, sorted, drawn evenly over sites and classes."""
    everything = np.arange(len(labels))
    if max_examples is None or max_examples >= len(labels):
        return everything
    rng = np.random.default_rng(seed)
    areas = np.zeros_like(labels) if sites is None else sites
    names, sizes = np.unique(areas, return_counts=True)
    kept = []
    for area, share in zip(names, allocate(sizes, max_examples, rng, at_least=1), strict=True):
        here = rng.permutation(everything[areas == area])
        classes, first, counts = np.unique(labels[here], return_index=True, return_counts=True)
        by_chance = np.argsort(first)  # not by number: the draw must not know the classes' order
        shares = allocate(counts[by_chance], int(share), rng)
        for label, count in zip(classes[by_chance], shares, strict=True):
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
    identities: Sequence[bytes] | None = None,
) -> tuple[Indices, Indices, Indices]:
    """Train, validation and test parts of `indices`, sorted, in the classes' proportions.

    Every example is for the test with the probability `test_fraction` and for validation with
    `validation_fraction`; the numbers, of each class and in all, are the exact ones rounded up or
    down. So a class of few examples has a test example at some clients and none at others, and may
    have no training example at one of them. A client always keeps one example to train on: where
    its fractions leave less than one, it holds out less of every class alike.

    Examples of one group stay together, under the label of most of them. Groups are then counted
    in the place of examples, and chosen evenly over small and large ones.

    `identities` names each example by what it is, such as a digest of its file; without them an
    example is its place among `indices`. The outcome depends on the seed and these alone, not on
    the classes' names or numbers.
    """
    rng = np.random.default_rng(seed)
    units = _units(indices, labels, groups, identities, seed)
    by_label: dict[int, list[Unit]] = {}
    for unit in sorted(units, key=lambda unit: unit.key):
        by_label.setdefault(unit.label, []).append(unit)
    fractions = _fractions(validation_fraction, test_fraction, len(units))
    sizes = np.array([len(own) for own in by_label.values()])
    counts = round_table(sizes[:, None] * fractions, rng)
    parts: tuple[list[Indices], list[Indices], list[Indices]] = ([], [], [])
    for own, (_, validation, test) in zip(by_label.values(), counts.tolist(), strict=True):
        for unit, role in zip(*_assigned(own, validation, test, rng), strict=True):
            parts[role].append(unit.rows)
    train, validation, test = map(_join, parts)
    return train, validation, test


def _fractions(validation: float, test: float, units: int) -> NDArray[np.float64]:
    """Shares `[3]` to train on, to validate and to test; the first is one unit at least."""
    held = np.array([validation, test])
    most = 1 - 1 / units
    if held.sum() > most:
        held *= most / held.sum()
    return np.append(1 - held.sum(), held)


def _assigned(
    units: list[Unit], validation: int, test: int, rng: np.random.Generator
) -> tuple[list[Unit], NDArray[np.int64]]:
    """Units of one class by size, and the part of each: 0 train, 1 validation, 2 test."""
    units = sorted(units, key=lambda unit: (len(unit.rows), unit.key))
    part = spread(validation + test, len(units), rng).astype(np.int64)
    held = np.flatnonzero(part)
    part[held[spread(test, len(held), rng)]] = 2
    return units, part


def _units(
    indices: Indices,
    labels: Indices,
    groups: Indices | None,
    identities: Sequence[bytes] | None,
    seed: int,
) -> list[Unit]:
    """What must stay together: single examples, or all of a group."""
    seen: Counter[bytes] = Counter()
    names = []
    for place, index in enumerate(indices.tolist()):
        identity = place.to_bytes(8, "big") if identities is None else identities[index]
        names.append(identity + seen[identity].to_bytes(8, "big"))  # copies are told apart
        seen[identity] += 1
    kinds = range(len(indices)) if groups is None else groups[indices].tolist()
    members: dict[int, list[int]] = {}
    for place in sorted(range(len(indices)), key=names.__getitem__):
        members.setdefault(kinds[place], []).append(place)
    units = []
    for places in members.values():
        rows = indices[places]
        own = labels[rows].tolist()
        if len(own) > 1:  # in the order of identities: of equally frequent labels the first found
            own = [label for label, _ in Counter(own).most_common(1)]
        units.append(Unit(rows, own[0], _key(names[places[0]], seed)))
    return units


def _key(name: bytes, seed: int) -> int:
    digest = blake2b(name, digest_size=8, key=seed.to_bytes(8, "big")).digest()
    return int.from_bytes(digest, "big")


def _join(parts: list[Indices]) -> Indices:
    return np.sort(np.concatenate(parts)) if parts else np.empty(0, dtype=np.int64)
