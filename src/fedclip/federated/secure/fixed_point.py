"""Fixed point modulo 2^32: numbers whose sum over clients cannot wrap around."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedclip.errors import FedclipError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Words = "NDArray[np.uint32]"


class DoesNotFit(FedclipError):
    """A number that is too large for the sum; `figure` is its size."""

    def __init__(self, figure: float, largest: float) -> None:
        super().__init__(f"holds {figure:.3g}, and {largest:.3g} is the most that fits")
        self.figure = figure


@dataclass(frozen=True)
class FixedPoint:
    """Numbers of a size up to `largest`, of so many clients, in steps of 2^-bits."""

    clients: int
    largest: float

    @property
    def bits(self) -> int:
        """Binary digits behind the point: clients * largest * 2^bits is below 2^31."""
        return min(30, math.ceil(31 - math.log2(self.clients * self.largest)) - 1)

    def encode(self, values: NDArray[np.float64]) -> NDArray[np.uint32]:
        """The numbers, rounded to the nearest step; raises DoesNotFit for one that is too large."""
        size = float(np.abs(values).max(initial=0.0))
        if not size <= self.largest:  # nor is nan
            raise DoesNotFit(size, self.largest)
        return np.rint(np.ldexp(values, self.bits)).astype(np.int64).astype(np.uint32)

    def decode(self, total: NDArray[np.uint32]) -> NDArray[np.float64]:
        """The sum of the clients' numbers."""
        return np.ldexp(total.view(np.int32).astype(np.float64), -self.bits)
