"""What planted examples (canaries) betray of who was in training: statistics of an audit.

Every canary is in the training data with probability 1/2, by itself; its score is higher where the
model seems to have seen it. Source of the bound: Steinke, Nasr & Jagielski 2023 (arXiv:2305.08846).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import binom, rankdata

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIDENCE = 0.95
MOST = 20.0
"""An epsilon that no number of guesses that is usual could show."""


def auc(scores: NDArray[np.float64], inside: NDArray[np.bool_]) -> float:
    """Probability that a canary that is in scores higher than one that is not."""
    members, others = int(inside.sum()), int((~inside).sum())
    ranks = rankdata(scores)[inside].sum()
    return float((ranks - members * (members + 1) / 2) / (members * others))


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
