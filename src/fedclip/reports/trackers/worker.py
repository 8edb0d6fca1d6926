"""A tracker at work in a thread: the run never waits for it, and hears of its faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from fedclip.reports.trackers.tracker import Tracker

_UNANSWERED = 0.4  # seconds that a run's start, and its end, wait for a server's first answer
_PATIENCE = 30.0  # and for one that has, since it last did


class Worker:
    """Logs the lines that there are, in their order, from the first that the tracker lacks."""

    def __init__(self, tracker: Tracker, lines: Sequence[tuple[dict[str, float], float]]) -> None:
        """Takes the list to which the run's lines are added."""
        self.tracker, self._lines = tracker, lines
        self._changed = threading.Condition()
        self._asked = self._served = 0
        self._loaded = False
        self._last: int | None = None  # None: not open yet
        self._finished: bool | None = None  # None: the run goes on
        self._failing = self._warned = False
        self._told = 0
        self._progress = time.monotonic()
        self._thread = threading.Thread(target=self._work, daemon=True, name="fedclip tracker")

    def begin(self) -> float | None:
        """Load the tracker's package, and say how long that took.

        A server is asked first. While it does not answer, nothing is loaded.
        """
        if self.tracker.server is not None:
            import httpx  # noqa: F401  # which the asking needs: no part of the wait for an answer
        self.go_on()
        self._thread.start()
        self.wait(or_fault=False)
        if self.tracker.server is not None and not self.tracker.answered:
            return None
        started = time.perf_counter()
        self.tracker.load()
        self._loaded = True
        return time.perf_counter() - started

    def go_on(self) -> None:
        """Has the thread log what is new."""
        with self._changed:
            self._asked += 1
            self._changed.notify_all()

    def end(self, finished: bool) -> None:
        """Has the thread log what is new, and end the record."""
        self._finished = finished
        self.go_on()

    def wait(self, or_fault: bool = True) -> None:
        """Waits until all is logged: for files, and for a server as long as it answers."""
        entered = time.monotonic()
        with self._changed:
            while self._served < self._asked:
                left = self._patience(entered)
                if left is not None and left <= 0:
                    if or_fault:
                        self._failed(f"{self.tracker.server} does not answer")
                    return
                self._changed.wait(left)

    def _patience(self, entered: float) -> float | None:
        if self.tracker.server is None:
            return None
        until = entered + _UNANSWERED
        if self.tracker.answered and not self._failing:
            until = max(until, self._progress + _PATIENCE)
        return until - time.monotonic()

    def new_notes(self) -> list[str]:
        """What the user has not yet been told."""
        new = self.tracker.notes[self._told :]
        self._told += len(new)
        return new

    def _failed(self, text: str) -> None:
        """Notes the first fault, and no other: one warning is enough."""
        self._failing = True
        if not self._warned:
            self._warned = True
            self.tracker.notes.append(f"{text}; the run goes on, and metrics.jsonl has its figures")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._served < self._asked)
                asked, finished = self._asked, self._finished
            # After the last round nobody asks again: a short fault there gets a second try.
            if not self._serve(finished) and finished is not None:
                self._serve(finished)
            with self._changed:
                self._served = asked
                self._changed.notify_all()
            if finished is not None:
                return

    def _serve(self, finished: bool | None) -> bool:
        try:
            if self.tracker.server is not None and not self.tracker.answered:
                self.tracker.ask_server()
            if self._lines:
                self._catch_up()
            if finished is not None and self._last is not None:
                self.tracker.close(finished)
        except Exception as error:
            self._failed(" ".join(f"{type(error).__name__}: {error}".split())[:300])
            return False
        self._failing = False
        return True

    def _catch_up(self) -> None:
        if self._last is None:
            if not self._loaded:
                self.tracker.load()
            self._last = self.tracker.open()
        for server_round in range(self._last + 1, len(self._lines)):
            figures, at = self._lines[server_round]
            self.tracker.log(server_round, figures, at)
            self._last, self._progress = server_round, time.monotonic()
