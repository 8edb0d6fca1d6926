"""What an audit has found: scores of members and others, and the figures made of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedclip.federated.privacy.audit import (
    CONFIDENCE,
    gaussian_epsilon,
    lower_bound,
    right_guesses,
    separation,
    standardised,
    stratified_auc,
)

GUESSED = 8
"""The share, as one over, of the canaries that is guessed in, and out."""
UNUSUAL_DELTA = 1e-5
"""Delta of the bound for a run that promises none."""
ERRORS, TWO_SIDED = 3, 1.96
"""Standard errors by which the estimate must lie above the promise, and those of an interval."""


class Scores(NamedTuple):
    """Scores `[n]`, who was in, and the stratum (training, client) that each one belongs to."""

    scores: NDArray[np.float64]
    inside: NDArray[np.bool_]
    strata: NDArray[np.int64]

    @classmethod
    def together(cls, parts: list[Scores]) -> Scores:
        """Those of several trainings, whose strata stay apart."""
        counts = np.cumsum([0, *(part.strata.max() + 1 for part in parts)])
        strata = [part.strata + count for part, count in zip(parts, counts, strict=False)]
        scores, inside = ([getattr(p, name) for p in parts] for name in ("scores", "inside"))
        return cls(np.concatenate(scores), np.concatenate(inside), np.concatenate(strata))


class Audit(NamedTuple):
    """The figures of an audit, and the scores that they come from, standardised by stratum."""

    figures: dict[str, Any]
    scores: NDArray[np.float64]
    inside: NDArray[np.bool_]


def judged(found: Scores, promise: tuple[float, float] | None) -> Audit:
    """The figures of scores, beside the epsilon and delta that are promised, if any are."""
    scores, inside = standardised(found.scores, found.strata), found.inside
    epsilon, delta = promise or (None, UNUSUAL_DELTA)
    each = len(scores) // GUESSED
    right = right_guesses(scores, inside, each)
    bound = lower_bound(right, 2 * each, len(scores), delta)
    ranked = stratified_auc(*found)
    mu, error = separation(scores, inside)
    surely = gaussian_epsilon(mu - ERRORS * error, delta)
    figures = {
        "canaries": len(scores),
        "inside": int(inside.sum()),
        "auc": ranked.auc,
        "auc_at_least": max(0.0, ranked.auc - TWO_SIDED * ranked.error),
        "auc_at_most": min(1.0, ranked.auc + TWO_SIDED * ranked.error),
        "auc_worst": ranked.worst,
        "guesses": 2 * each,
        "right": right,
        "confidence": CONFIDENCE,
        "epsilon_at_least": bound,
        "epsilon_gaussian": gaussian_epsilon(mu, delta),
        "epsilon_gaussian_at_least": surely,
        "epsilon_promised": epsilon,
        "delta": delta,
        "broken": epsilon is not None and max(bound, surely) > epsilon,
    }
    return Audit(figures, scores, inside)
