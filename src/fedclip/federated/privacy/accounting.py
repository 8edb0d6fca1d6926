"""Privacy accounting of the Poisson-subsampled Gaussian mechanism, by Opacus' accountants.

Epsilon is that of numerical composition (PRV, Gopi et al. 2021, arXiv:2106.02848), an upper bound;
beside it stands the looser one of Renyi differential privacy (Mironov et al. 2019,
arXiv:1908.10530). Both hold where one example (or client) more or less makes the difference.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from fedclip.errors import UsageError, install

HOPELESS = 100.0
"""RDP's epsilon above which PRV's is not computed: that takes minutes, and neither promises any."""
MOST_NOISE = 1e4
"""Noise multiplier beyond which no target is looked for."""
TIGHT = 0.02
"""How far epsilon may stay below its target, as a share of it."""


class Spent(NamedTuple):
    """A mechanism and how often it ran."""

    sampling_rate: float
    noise_multiplier: float
    steps: int


class Epsilon(NamedTuple):
    """The smaller of PRV's and RDP's epsilon, and RDP's; both 0 where nothing ran."""

    least: float
    rdp: float


def require_accountant() -> None:
    """Raise UsageError where Opacus or the cipher is not installed."""
    if find_spec("opacus") is None or find_spec("cryptography") is None:
        raise UsageError(
            f"privacy needs Opacus' accountant and cryptography's cipher; {install('privacy')}"
        )


def epsilon(spent: Spent, delta: float) -> Epsilon:
    """Epsilon of a mechanism's steps at a delta; above 100 that of RDP stands for both."""
    return _epsilon(*spent, delta) if spent.steps else Epsilon(0.0, 0.0)


def largest(parties: Iterable[Spent], delta: float) -> Epsilon:
    """The largest of each epsilon over parties that hold different examples."""
    found = [epsilon(own, delta) for own in parties]
    return Epsilon(*(max(values) for values in zip(Epsilon(0.0, 0.0), *found, strict=True)))


@lru_cache(maxsize=10_000)
def noise_for(target: float, delta: float, sampling_rate: float, steps: int) -> float:
    """A noise multiplier whose epsilon is at most `target`, and at most 2 % below it.

    RDP at whole orders, which is quick, gives the upper end; between the ends the logarithm of
    epsilon is interpolated over that of the noise.
    """

    def reached(noise: float) -> float:
        return max(epsilon(Spent(sampling_rate, noise, steps), delta).least, 1e-12)

    high = _enough_by_rdp(target, delta, sampling_rate, steps)
    low, at_high = 0.8 * high, reached(high)
    while (at_low := reached(low)) <= target:
        high, at_high, low = low, at_low, 0.8 * low
    while at_high < target * (1 - TIGHT):
        share = math.log(at_low / (target * (1 - TIGHT / 2))) / math.log(at_low / at_high)
        middle = low * (high / low) ** min(max(share, 0.05), 0.95)
        at_middle = reached(middle)
        if at_middle > target:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
    return high


def _enough_by_rdp(target: float, delta: float, sampling_rate: float, steps: int) -> float:
    """A noise multiplier, to a twentieth, at which RDP's epsilon is at most the target."""

    def too_little(noise: float) -> bool:
        return _rdp(sampling_rate, noise, steps, delta, whole=True) > target

    low, high = 0.0, 0.5
    while too_little(high):
        low, high = high, 2 * high
        if high > MOST_NOISE:
            raise UsageError(
                f"privacy.target_epsilon: {target:g} at privacy.delta: {delta:g} in {steps} steps "
                f"takes noise of more than {MOST_NOISE:g} times privacy.clip_norm; raise one of "
                "the two, or train for fewer rounds"
            )
    while high - low > 0.05 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if too_little(middle) else (low, middle)
    return high


@lru_cache(maxsize=10_000)
def _epsilon(sampling_rate: float, noise: float, steps: int, delta: float) -> Epsilon:
    rdp = _rdp(sampling_rate, noise, steps, delta)
    return Epsilon(
        rdp if rdp > HOPELESS else min(rdp, _prv(sampling_rate, noise, steps, delta)), rdp
    )


def _prv(sampling_rate: float, noise: float, steps: int, delta: float) -> float:
    """Opacus' `PRVAccountant.get_epsilon`, but for Renyi divergences that are computed once."""
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import Domain

    class Accountant(PRVAccountant):  # type: ignore[misc]
        def _get_domain(self, *, eps_error: float, delta_error: float, **_: Any) -> Domain:
            ends = (
                _rdp(sampling_rate, noise, steps, delta_error / 4),
                _rdp(sampling_rate, noise, 1, delta_error / (8 * steps)),
                eps_error,
            )
            mesh = eps_error / np.sqrt(steps * np.log(12 / delta_error) / 2)
            return Domain.create_aligned(-max(ends) - 3, max(ends) + 3, mesh)

    accountant = Accountant()
    accountant.history = [(noise, sampling_rate, steps)]
    with _quiet():
        found = float(accountant.get_epsilon(delta))
    return found if found >= 0 else math.inf  # NaN is no bound


def _rdp(
    sampling_rate: float, noise: float, steps: int, delta: float, whole: bool = False
) -> float:
    """Opacus' `RDPAccountant.get_epsilon`; at whole orders alone a looser bound."""
    from opacus.accountants.analysis.rdp import get_privacy_spent

    orders, divergences = _divergences(sampling_rate, noise, whole)
    with _quiet():
        found = get_privacy_spent(orders=orders, rdp=divergences * steps, delta=delta)
    return float(found[0]) if found[0] >= 0 else math.inf


@lru_cache(maxsize=10_000)
def _divergences(sampling_rate: float, noise: float, whole: bool) -> tuple[list[float], Any]:
    """Orders, and a step's Renyi divergence of each."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = [order for order in RDPAccountant.DEFAULT_ALPHAS if not whole or order == int(order)]
    with _quiet():
        return orders, compute_rdp(q=sampling_rate, noise_multiplier=noise, steps=1, orders=orders)


@contextmanager
def _quiet() -> Iterator[None]:
    """Passes over warnings of a logarithm of 0, where every example is taken, and of an order at
    the end of the grid: both leave an upper bound.
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield
