"""What planted examples (canaries) betray of who was in training: statistics of an audit.

Every canary is in the training data with probability 1/2, by itself; its score is higher where the
model seems to have seen it. Source of the bound: Steinke, Nasr & Jagielski 2023 (arXiv:2305.08846).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.stats import binom, norm

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIDENCE = 0.95
MOST = 20.0
"""An epsilon that no number of guesses that is usual could show."""


def right_guesses(scores: NDArray[np.float64], inside: NDArray[np.bool_], each: int) -> int:
    """How many are right of guessing the `each` highest to be in and the `each` lowest out."""
    order = np.argsort(scores, kind="stable")
    return int(inside[order[-each:]].sum() + (~inside[order[:each]]).sum())


def lower_bound(right: int, guesses: int, canaries: int, delta: float) -> float:
    """The largest epsilon that so many right guesses rule out at 95 % confidence; 0 for none.

    Of (epsilon, delta)-private training, v of r guesses are right with a probability of at most
    P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i, with W ~ Bin(r, e^eps / (1 + e^eps)) and m
    canaries (theorem 5.2). How many guesses there are must be fixed before the scores are seen.
    """

    def likely(epsilon: float) -> bool:
        tail = binom.sf(right - 1 - np.arange(right + 1), guesses, 1 / (1 + np.exp(-epsilon)))
        steps = np.arange(1, right + 1)
        more = ((tail[1:] - tail[0]) / steps).max(initial=0.0)
        return bool(tail[0] + 2 * canaries * delta * more >= 1 - CONFIDENCE)

    if likely(0.0):
        return 0.0
    low, high = 0.0, MOST
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if likely(middle) else (middle, high)
    return low


def separation(scores: NDArray[np.float64], inside: NDArray[np.bool_]) -> tuple[float, float]:
    """d' = (mean of those in - mean of those out) / their deviation, and its standard error."""
    own, others = scores[inside], scores[~inside]
    squares = ((own - own.mean()) ** 2).sum() + ((others - others.mean()) ** 2).sum()
    deviation = np.sqrt(max(squares / (len(scores) - 2), 1e-300))  # scores may all be the same
    distance = float((own.mean() - others.mean()) / deviation)
    variance = 1 / len(own) + 1 / len(others) + distance**2 / (2 * len(scores))
    return distance, float(np.sqrt(variance))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon at a delta where what is seen is N(mu, 1) with a canary, and N(0, 1) without it.

    Dong, Roth & Su 2019 (arXiv:1905.02383, corollary 1): delta = Phi(-eps/mu + mu/2) - e^eps
    Phi(-eps/mu - mu/2).
    """

    def exceeds(epsilon: float) -> bool:
        first = norm.logcdf(-epsilon / mu + mu / 2)
        second = epsilon + norm.logcdf(-epsilon / mu - mu / 2)
        return bool(first + np.log1p(-np.exp(min(second - first, 0.0))) > np.log(delta))

    if mu <= 0 or not exceeds(0.0):
        return 0.0
    low, high = 0.0, mu**2 / 2 + mu * np.sqrt(2 * np.log(1 / delta))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if exceeds(middle) else (low, middle)
    return float(high)


class Stratified(NamedTuple):
    """An AUC over pairs of the same stratum, its standard error, and the largest of a stratum."""

    auc: float
    error: float
    worst: float


def stratified_auc(
    scores: NDArray[np.float64], inside: NDArray[np.bool_], strata: NDArray[np.int64]
) -> Stratified:
    """AUC where a canary is compared with those of its own client (and training) only.

    The standard error is that of DeLong et al. 1988, stratum by stratum.
    """
    pairs, aucs, variances = [], [], []
    for stratum in np.unique(strata):
        own, others = (scores[(strata == stratum) & which] for which in (inside, ~inside))
        if not len(own) or not len(others):
            continue
        wins = (own[:, None] > others) + 0.5 * (own[:, None] == others)
        parts = (wins.mean(axis=1), wins.mean(axis=0))
        variances.append(sum(p.var(ddof=1) / len(p) if len(p) > 1 else 0.25 for p in parts))
        pairs.append(wins.size)
        aucs.append(wins.mean())
    shares = np.array(pairs) / sum(pairs)
    error = float(np.sqrt((shares**2 * np.array(variances)).sum()))
    return Stratified(float((shares * aucs).sum()), error, float(max(aucs)))


def standardised(scores: NDArray[np.float64], strata: NDArray[np.int64]) -> NDArray[np.float64]:
    """Scores with mean 0 and deviation 1 in every stratum, so that strata can be ranked together.

    It looks at nobody's membership, so an attacker may do it as well.
    """
    result = np.zeros_like(scores)
    for stratum in np.unique(strata):
        own = strata == stratum
        result[own] = (scores[own] - scores[own].mean()) / max(scores[own].std(), 1e-30)
    return result
