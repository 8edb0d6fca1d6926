"""Adaptive clipping of clients' updates: the clip norm follows a quantile of their norms.

Andrew et al. 2021 (arXiv:1905.03871). A client also tells b = 1 where its update is no longer than
the clip norm C; the noisy share b~ = 1/2 + (sum (b - 1/2) + N(0, sigma_b^2)) / (q N) moves the norm
for the next round: C <- C exp(-eta (b~ - gamma)). One client changes the sum of b - 1/2 by at most
1/2, so both sums together are one Gaussian mechanism of the noise multiplier z where that of the
updates is z_D = (z^-2 - (2 sigma_b)^-2)^(-1/2): that is how the count is paid for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedclip.errors import UsageError

RATE = 0.2
"""eta: how fast the norm follows."""
COUNTED = 20
"""The noise on the count, sigma_b, is q N divided by this."""


@dataclass
class ClipNorm:
    """The clip norm that the next mean clips to, and the quantile that it follows."""

    norm: float
    quantile: float

    def hear(self, share: float) -> None:
        """Move towards the quantile by the noisy share of updates that were shorter."""
        self.norm *= math.exp(-RATE * (share - self.quantile))


def noise_of_sum(multiplier: float, expected: int) -> float:
    """z_D, which leaves as much of z as the count takes."""
    most = 2 * expected / COUNTED
    if multiplier >= most:
        raise UsageError(
            f"privacy.clip_quantile: a noise multiplier of {multiplier:.3g} leaves nothing for the "
            f"count of short updates, which needs more than {10 * multiplier:.0f} clients a round "
            f"(federation.clients_per_round), and {expected} are expected; ask more of them, raise "
            "privacy.target_epsilon, or leave privacy.clip_quantile out"
        )
    return (multiplier**-2 - most**-2) ** -0.5
