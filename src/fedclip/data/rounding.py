"""Unbiased randomised rounding: whole numbers whose expected values are the fractions asked for."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Cell = tuple[int, int]

_EPSILON = 1e-9  # what is so near to a whole number is one, but for floating-point error


def round_row(expected: NDArray[np.float64], total: int, rng: np.random.Generator) -> Counts:
    """Each number to one of its two neighbours, so that they sum to `total`, as `expected` does.

    Systematic sampling (Madow 1949) in a random order: floors, and the remainders as
    probabilities, so that no place in the list is favoured.
    """
    order = rng.permutation(len(expected))
    ends = np.append(0.0, expected[order].cumsum())
    ends = np.where(np.abs(ends - np.rint(ends)) < _EPSILON, np.rint(ends), ends)
    ends[-1] = total
    counts = np.empty(len(expected), dtype=np.int64)
    counts[order] = np.diff(np.floor(ends + rng.random() * (1 - _EPSILON)).astype(np.int64))
    return counts


def round_table(expected: NDArray[np.float64], rng: np.random.Generator) -> Counts:
    """Round a table `[rows, 3]` whose row sums are whole: each cell and each column sum too.

    Every cell, and every column sum, becomes one of its two neighbours, with `expected` as its
    expected value; row sums stay. Unbiased controlled rounding (Cox 1987, JASA 82, 520-524) by
    the dependent rounding of Gandhi et al. 2006 (J. ACM 53, 324-360, section 2): as long as the
    fractions form a cycle through rows and columns, add to every second of its cells and take
    from the others, with probabilities that keep the expected values.
    """
    margin = expected.sum(axis=0)
    table = np.vstack([expected, np.ceil(margin - _EPSILON) - margin])  # column sums are whole
    whole = np.floor(table + _EPSILON)
    rest = table - whole
    rest[np.abs(rest) < _EPSILON] = 0.0
    waiting: list[int] = []  # rows that have fractions left; never more than three
    for row in range(len(rest)):
        waiting = _fractional(rest, [*waiting, row])
        while cycle := _cycle(rest, waiting):
            _rotate(rest, cycle, rng)
            waiting = _fractional(rest, waiting)
    return (whole + np.rint(rest))[:-1].astype(np.int64)


def spread(count: int, places: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Choose `count` of so many places at equal distances; every place is as likely as another."""
    steps = np.arange(places + 1) * count + (rng.integers(places) if places else 0)
    return np.diff(steps // max(1, places)) > 0


def _cycle(rest: NDArray[np.float64], rows: list[int]) -> list[Cell]:
    """Cells, alternately to add to and to take from; none where the fractions form no cycle."""
    columns = {row: {c for c in range(3) if 0 < rest[row, c] < 1} for row in rows}
    for a, b in combinations(rows, 2):
        shared = sorted(columns[a] & columns[b])
        if len(shared) > 1:
            c, d = shared[:2]
            return [(a, c), (a, d), (b, d), (b, c)]
    for a, b, c in combinations(rows, 3):  # each pair shares one column at most
        ab, bc, ca = columns[a] & columns[b], columns[b] & columns[c], columns[c] & columns[a]
        if ab and bc and ca:
            (y,), (z,), (x,) = ab, bc, ca
            return [(a, x), (a, y), (b, y), (b, z), (c, z), (c, x)]
    return []


def _rotate(rest: NDArray[np.float64], cycle: list[Cell], rng: np.random.Generator) -> None:
    """Move along a cycle until a cell is whole, either way, with unchanged expected values."""
    plus, minus = ([rest[cell] for cell in cycle[first::2]] for first in (0, 1))
    up = min(1 - max(plus), min(minus))
    down = min(min(plus), 1 - max(minus))
    step = up if rng.random() * (up + down) < down else -down
    for place, cell in enumerate(cycle):
        moved = rest[cell] + (-step if place % 2 else step)
        nearest = round(moved)
        rest[cell] = nearest if abs(moved - nearest) < _EPSILON else moved


def _fractional(rest: NDArray[np.float64], rows: list[int]) -> list[int]:
    return [row for row in rows if ((rest[row] > 0) & (rest[row] < 1)).any()]
