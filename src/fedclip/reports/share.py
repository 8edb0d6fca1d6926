"""How sure a share of a test set is, by the number of its images: Wilson's interval, in words."""

from __future__ import annotations

import math

FEW = 100
"""With fewer test images than this a run says that they are few."""
_Z = 1.959963984540054  # of a standard normal, 95 % lie between -_Z and _Z


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` independent images, within 0 and 1.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    spread = _Z * math.sqrt(share * (1 - share) / count + (_Z / (2 * count)) ** 2)
    centre, whole = share + _Z**2 / (2 * count), 1 + _Z**2 / count
    return max(0.0, (centre - spread) / whole), min(1.0, (centre + spread) / whole)


def interval_of(share: float | None, count: int | None, *, tasks: bool = False) -> str | None:
    """The interval as text; None where it is unknown, or the share a mean over `tasks`."""
    if share is None or not count or tasks:
        return None
    low, high = wilson(share, count)
    return f"{low:.3f} to {high:.3f}"


def few(count: int | None) -> str | None:
    """What to think of figures of few test images; None where there are enough, or none."""
    if not count or count >= FEW:
        return None
    one = "a single test image is" if count == 1 else f"{count} test images are"
    return f"{one} little to go by: each one moves the accuracy by {1 / count:.3f}"


def none_is_worse(lowest: float | None, mean: float | None) -> bool:
    """Whether all of which one is the lowest are equal: only then is it the mean of them all."""
    return lowest is not None and mean is not None and math.isclose(lowest, mean, abs_tol=1e-9)
