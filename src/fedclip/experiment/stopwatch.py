"""Durations from lap to lap."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds from one lap to the next, the first since `started`."""

    def __init__(self, started: float) -> None:
        """Takes a reading of `time.perf_counter`."""
        self._last = started

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
