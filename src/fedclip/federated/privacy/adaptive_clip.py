"""Adaptive clipping of clients' updates: the clip norm follows a quantile of their norms.

Andrew et al. 2021 (arXiv:1905.03871). A client also tells b = 1 where its update is no longer than
the clip norm C; the noisy share b~ = 1/2 + (sum (b - 1/2) + N(0, sigma_b^2)) / (q N) moves the norm
for the next round: C <- C exp(-eta (b~ - gamma)). One client changes the sum of b - 1/2 by at most
1/2, so both sums together are one Gaussian mechanism of the noise multiplier z where that of the
updates is z_D = (z^-2 - (2 sigma_b)^-2)^(-1/2): that is how the count is paid for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from fedclip.errors import UsageError
from fedclip.federated.strategies.base import Strategy, Train
from fedclip.records import RunState, TrainRequest

RATE = 0.2
"""eta: how fast the norm follows."""
COUNTED = 20
"""The noise on the count, sigma_b, is q N divided by this."""
NORM = "privacy/clip_norm"
"""Where the norm is kept between rounds, in the server's memory."""


@dataclass
class ClipNorm:
    """The clip norm that the next mean clips to, and the quantile that it follows."""

    norm: float
    quantile: float

    def hear(self, share: float) -> None:
        """Move towards the quantile by the noisy share of updates that were shorter."""
        self.norm *= math.exp(-RATE * (share - self.quantile))


class AdaptiveClip(Strategy):
    """A strategy, private already, whose clip norm is kept from round to round."""

    def __init__(self, inner: Strategy, clip: ClipNorm) -> None:
        """Takes the strategy with its guard, which clips to `clip` and has it hear the share."""
        super().__init__(inner.setting)
        self.personal = inner.personal
        self._inner = inner
        self._clip = clip

    def round(self, state: RunState, request: TrainRequest, train: Train) -> RunState:
        """A round of the strategy inside, and the norm for the next one."""
        if NORM in state.server:
            self._clip.norm = float(state.server[NORM])
        after = self._inner.round(state, request, train)
        norm = torch.tensor(self._clip.norm, dtype=torch.float64)
        return replace(after, server={**after.server, NORM: norm})


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
