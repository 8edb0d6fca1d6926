"""Inference on differences between arms: paired intervals, Holm's correction, ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.05


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval; `low` and `high` are None where there is none."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def half(self) -> float | None:
        """Half of the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def interval(
    values: Sequence[float], *, image_error: float = 0.0, share: bool = False, level: float = LEVEL
) -> Interval:
    """Mean over seeds and its interval by Student's t; one of a `share` stays within 0 and 1.

    `image_error` is the standard error that comes from the test images, which all seeds share.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean)
    error, freedom = _error(values, image_error)
    half = float(stats.t.ppf(1 - level / 2, freedom)) * error
    low, high = mean - half, mean + half
    return Interval(mean, max(0.0, low), min(1.0, high)) if share else Interval(mean, low, high)


def _error(values: Sequence[float], image_error: float) -> tuple[float, float]:
    """Standard error of a mean from seeds and images together, and its degrees of freedom.

    Freedom by Welch and Satterthwaite (Welch 1947, Biometrika 34, 28-35): seeds minus one, and
    more where the error from the images, whose number is large, has a part in it.
    """
    n = len(values)
    from_seeds, from_images = statistics.variance(values) / n, image_error**2
    if from_seeds == 0:
        return image_error, math.inf if image_error else n - 1
    freedom = (n - 1) * ((from_seeds + from_images) / from_seeds) ** 2
    return math.sqrt(from_seeds + from_images), freedom


def image_error(hits: NDArray[np.float64], seed: int = 0) -> float:
    """Standard error of a mean over test images, by the bootstrap; `hits` is `[seeds, images]`.

    Images are drawn with replacement, the same for all seeds. `hits` are 0 or 1, or differences of
    two arms' hits. Source: Efron and Tibshirani 1993, chapter 6.
    """
    by_image = hits.mean(axis=0)  # [images]
    if by_image.size < 2 or np.ptp(by_image) == 0:
        return 0.0
    found = stats.bootstrap(
        (by_image,), np.mean, n_resamples=1000, method="basic", batch=100,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.standard_error)


def p_value(differences: Sequence[float], image_error: float = 0.0) -> float | None:
    """Two-sided p of a mean of 0, by the t of `interval`; None for fewer than two seeds."""
    if len(differences) < 2:
        return None
    mean = statistics.fmean(differences)
    error, freedom = _error(differences, image_error)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, freedom))


def holm(p_values: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """P-values corrected for all comparisons of a table, and the level of each one's interval.

    The smallest of m p-values is held against 0.05 / m, the next against 0.05 / (m - 1), and so on
    until one fails. Source: Holm 1979, Scand. J. Statist. 6, 65-70.
    """
    adjusted, largest = {}, 0.0
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for rank, name in enumerate(ordered):
        left = len(ordered) - rank
        largest = max(largest, min(1.0, left * p_values[name]))
        adjusted[name] = largest, LEVEL / left
    return adjusted


def ratio(
    ours: Sequence[float],
    theirs: Sequence[float],
    images: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
) -> Interval:
    """Ratio of two paired means with its 95 % interval by Fieller's theorem.

    `images` are both arms' hits, `[seeds, images]` each: the error from the choice of test images
    is then part of it. Without ends where their mean is not told apart from 0. Source: Fieller
    1954, J. R. Statist. Soc. B 16, 175-185.
    """
    x, y = np.asarray(ours), np.asarray(theirs)
    n = len(x)
    mean = float(x.mean() / y.mean()) if y.mean() else math.nan
    if n < 2 or not y.mean():
        return Interval(mean)
    error = np.cov(x, y) / n
    freedom = float(n - 1)
    if images is not None:
        by_image = [hits.mean(axis=0) for hits in images]
        more = np.cov(*by_image) / by_image[0].size
        apart = np.array([1.0, -mean])  # of x - mean y, whose errors decide
        from_seeds, from_images = apart @ error @ apart, apart @ more @ apart
        freedom = freedom * ((from_seeds + from_images) / from_seeds) ** 2 if from_seeds else 1e9
        error = error + more
    t2 = float(stats.t.ppf(1 - LEVEL / 2, freedom)) ** 2
    (xx, xy), (_, yy) = error
    a, b, c = y.mean() ** 2 - t2 * yy, x.mean() * y.mean() - t2 * xy, x.mean() ** 2 - t2 * xx
    if a <= 0 or (root := b * b - a * c) < 0:
        return Interval(mean)
    return Interval(mean, float((b - math.sqrt(root)) / a), float((b + math.sqrt(root)) / a))


def verdict(mean: float, adjusted_p: float | None) -> str:
    """`better`, `worse` or `tie`: what a difference allows to say."""
    if adjusted_p is None or adjusted_p > LEVEL:
        return "tie"
    return "better" if mean > 0 else "worse"
