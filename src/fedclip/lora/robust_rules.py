"""Robust aggregation rules: pure functions that bear up to f hostile clients among n.

Weighing rules take the Gram matrix `[n, n]` of the clients' changes (their inner products) and give
weights `[n]` of at most 1 in sum: the aggregate is the start plus the weighted sum of the changes.
So they never need the changes themselves, which are products B A of large matrices. Coordinate
rules take the values `[n, ...]`, number by number. All arithmetic is in float64, and free of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """A rule: `apply(gram, f)` gives weights, `apply(values, f)` of a coordinate rule a value."""

    apply: Callable[[Any, int], Any]
    coordinates: bool = False
    neighbours: bool = False  # Krum's scores need n - f - 2 >= f + 1 neighbours

    def least(self, attackers: int) -> int:
        """The fewest clients among which so many hostile ones can be borne."""
        return 2 * attackers + (3 if self.neighbours else 1)


def distances(gram: Numbers) -> Numbers:
    """Squared distances `[n, n]` between the changes, zero to themselves."""
    squares = np.diag(gram)
    found = np.maximum(squares[:, None] + squares - 2 * gram, 0)
    np.fill_diagonal(found, 0.0)
    return found


def krum_scores(gram: Numbers, attackers: int) -> Numbers:
    """Sum of the squared distances to the n - f - 2 nearest others, `[n]`."""
    others = np.sort(distances(gram), axis=1)[:, 1:]  # without itself
    return np.asarray(others[:, : len(gram) - attackers - 2].sum(axis=1))


def krum(gram: Numbers, attackers: int) -> Numbers:
    """The one change with the least score (Blanchard et al. 2017, arXiv:1703.02757)."""
    return _equal(len(gram), np.argsort(krum_scores(gram, attackers), kind="stable")[:1])


def multi_krum(gram: Numbers, attackers: int) -> Numbers:
    """The mean of the n - f changes with the least scores (same paper, section 4)."""
    order = np.argsort(krum_scores(gram, attackers), kind="stable")
    return _equal(len(gram), order[: len(gram) - attackers])


def rfa(gram: Numbers, attackers: int, *, nu: float = 1e-6, steps: int = 50) -> Numbers:
    """The geometric median, by smoothed Weiszfeld steps from no change.

    Pillutla et al. 2022 (arXiv:1912.13445, algorithm 2): each weighs 1 / max(nu, its distance).
    """
    z = np.zeros(len(gram))  # as weights of the changes
    for _ in range(steps):
        inverse = 1 / np.maximum(nu, _distances_to(gram, z))
        z = inverse / inverse.sum()
    return z


def norm_clipping(gram: Numbers, attackers: int) -> Numbers:
    """The mean weighted by what cuts each change to the median norm.

    Sun et al. 2019 (arXiv:1911.07963) cut and take the plain mean, whose step is the smaller the
    more is cut. Here the weights sum to 1, as Huber's do; the result is at most twice as long as
    the median, as half of the changes are not cut.
    """
    norms = np.sqrt(np.diag(gram))
    weights = _shortened(norms, float(np.median(norms)))
    return weights / weights.sum()


def centred_clipping(gram: Numbers, attackers: int, *, steps: int = 5) -> Numbers:
    """Steps v + mean of (x_i - v), each no longer than the median of them, from no change.

    Karimireddy et al. 2021 (arXiv:2012.10333), with the median distance for their radius.
    """
    v = np.zeros(len(gram))  # as weights of the changes
    for _ in range(steps):
        away = _distances_to(gram, v)
        kept = _shortened(away, float(np.median(away))) / len(gram)
        v = v * (1 - kept.sum()) + kept
    return v


def mixing(gram: Numbers, attackers: int) -> Numbers:
    """Nearest-neighbour mixing: each change becomes the mean of its n - f nearest, `[n, n]`.

    Allouah et al. 2023 (arXiv:2302.01772). It counts itself among them; of equals the first.
    """
    count = len(gram) - attackers
    nearest = np.argsort(distances(gram), axis=1, kind="stable")[:, :count]
    return np.stack([_equal(len(gram), row) for row in nearest])


def median(values: Numbers, attackers: int) -> Numbers:
    """The median of each number (Yin et al. 2018, arXiv:1803.01498); of two, their mean."""
    return np.asarray(np.median(values, axis=0))


def trimmed_mean(values: Numbers, attackers: int) -> Numbers:
    """The mean of each number without its f least and f largest (same paper)."""
    whole = np.sort(values, axis=0)
    return np.asarray(whole[attackers : len(whole) - attackers].mean(axis=0))


RULES = {
    "multi_krum": Rule(multi_krum, neighbours=True),
    "krum": Rule(krum, neighbours=True),
    "rfa": Rule(rfa),
    "norm_clipping": Rule(norm_clipping),
    "centred_clipping": Rule(centred_clipping),
    "median": Rule(median, coordinates=True),
    "trimmed_mean": Rule(trimmed_mean, coordinates=True),
}


def capped_weights(weights: Numbers, share: float) -> Numbers:
    """The weights, none of which is more than a share of their sum; equal where that cannot be.

    The k largest become t with t = share (k t + the rest), for the least k that does.
    """
    order = np.argsort(-weights, kind="stable")
    for k in range(len(weights)):
        rest, largest = weights[order[k:]].sum(), weights[order[k]]
        if share * k >= 1:
            break
        limit = share * rest / (1 - share * k)
        if largest <= limit * (1 + 1e-12):
            found = weights.astype(np.float64)
            found[order[:k]] = limit
            return found
    return np.ones(len(weights))


def _distances_to(gram: Numbers, weights: Numbers) -> Numbers:
    """Distances `[n]` of the changes to their weighted sum."""
    squares = np.diag(gram) - 2 * gram @ weights + weights @ gram @ weights
    return np.asarray(np.sqrt(np.maximum(squares, 0)))


def _shortened(lengths: Numbers, most: float) -> Numbers:
    """Factors by which lengths come down to `most`; of no length there is nothing to shorten."""
    return np.minimum(1, most / np.where(lengths > 0, lengths, 1)) if most else (lengths == 0) * 1.0


def _equal(n: int, chosen: NDArray[np.intp]) -> Numbers:
    weights = np.zeros(n)
    weights[chosen] = 1 / len(chosen)
    return weights
