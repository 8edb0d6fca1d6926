"""Attacks of hostile clients: what they send, as pure functions of a round's honest changes.

`send(own, honest, draw, strength)` gives what the attackers send `[attackers, numbers]` in the
place of `own`, knowing what the others changed, `honest` `[n, numbers]`. All arithmetic is in
float64, and free of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

Send = Callable[[Any, Any, np.random.Generator, float], Any]


@dataclass(frozen=True)
class Attack:
    """An attack: what of a client it falsifies, and its usual `strength`, None where it has none.

    `means` says in words what the strength is; the largest that it can be is `most`.
    """

    falsifies: Literal["update", "factors", "labels", "images", "examples"]
    strength: float | None = None
    means: str = ""
    send: Send | None = None  # of an update
    most: float = 1e6


def sign_flip(own: Numbers, honest: Numbers, draw: np.random.Generator, strength: float) -> Numbers:
    """Minus so many times its own change."""
    return -strength * own


def scaling(own: Numbers, honest: Numbers, draw: np.random.Generator, strength: float) -> Numbers:
    """So many times its own change."""
    return strength * own


def gaussian(own: Numbers, honest: Numbers, draw: np.random.Generator, strength: float) -> Numbers:
    """Noise whose norm is so many times the median norm of the honest changes."""
    noise = draw.standard_normal(own.shape)
    usual = np.median(np.linalg.norm(honest, axis=1))
    return np.asarray(noise / np.linalg.norm(noise, axis=1, keepdims=True) * strength * usual)


def alie(own: Numbers, honest: Numbers, draw: np.random.Generator, strength: float) -> Numbers:
    """The honest mean less so many standard deviations, number by number.

    "A little is enough", Baruch et al. 2019 (arXiv:1902.06156).
    """
    spread = honest.std(axis=0, ddof=min(1, len(honest) - 1))
    return _all(own, honest.mean(axis=0) - strength * spread)


def ipm(own: Numbers, honest: Numbers, draw: np.random.Generator, strength: float) -> Numbers:
    """Minus a multiple of the honest mean (inner-product manipulation).

    "Fall of empires", Xie et al. 2019 (arXiv:1903.03936).
    """
    return _all(own, -strength * honest.mean(axis=0))


def min_max(own: Numbers, honest: Numbers, draw: np.random.Generator, strength: float) -> Numbers:
    """As far from the honest changes as they are from each other, against the honest mean.

    Shejwalkar and Houmansadr 2021 (NDSS): the mean plus a multiple of a direction, here their unit
    vector, minus the mean itself.
    """
    return _all(own, _farthest(honest, -honest.mean(axis=0)))


def min_max_sign(
    own: Numbers, honest: Numbers, draw: np.random.Generator, strength: float
) -> Numbers:
    """Min-max against the sign of each number of the mean (same paper)."""
    return _all(own, _farthest(honest, -np.sign(honest.mean(axis=0))))


def min_max_std(
    own: Numbers, honest: Numbers, draw: np.random.Generator, strength: float
) -> Numbers:
    """Min-max against the standard deviation of each number (same paper)."""
    return _all(own, _farthest(honest, -honest.std(axis=0, ddof=min(1, len(honest) - 1))))


def _farthest(honest: Numbers, direction: Numbers) -> Numbers:
    """The honest mean plus the most of a direction `[numbers]`, found by bisection.

    No honest change is farther from it than the two farthest honest changes are from each other.
    """
    gram = honest @ honest.T
    squares = np.diag(gram)
    most = np.sqrt(np.maximum(squares[:, None] + squares - 2 * gram, 0).max())
    mean = honest.mean(axis=0)
    away = direction / max(float(np.linalg.norm(direction)), 1e-30)
    low, high = 0.0, float(2 * most + 2 * np.linalg.norm(mean))
    for _ in range(60):
        gamma = (low + high) / 2
        fits = np.linalg.norm(honest - (mean + gamma * away), axis=1).max() <= most
        low, high = (gamma, high) if fits else (low, gamma)
    return np.asarray(mean + low * away)


def _all(own: Numbers, vector: Numbers) -> Numbers:
    """The same vector from every attacker."""
    return np.broadcast_to(vector, own.shape)


ATTACKS = {
    "label_flip": Attack("labels"),
    "sign_flip": Attack("update", 5.0, "times its own change, with the other sign", sign_flip),
    "scaling": Attack("update", 10.0, "times its own change", scaling),
    "gaussian": Attack("update", 10.0, "times the median norm of the honest changes", gaussian),
    "alie": Attack("update", 1.5, "standard deviations from the honest mean", alie),
    "ipm": Attack("update", 0.5, "times the honest mean, with the other sign", ipm),
    "min_max": Attack("update", send=min_max),
    "min_max_sign": Attack("update", send=min_max_sign),
    "min_max_std": Attack("update", send=min_max_std),
    "backdoor": Attack("images", 0.5, "share of an attacker's images that have the patch", most=1),
    "gauge": Attack("factors", 1000.0, "the t of (B t, A / t)"),
    "inflation": Attack("examples", 100.0, "times its number of examples", most=1e4),
}
