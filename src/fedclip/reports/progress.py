"""Progress displays: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedclip.records import ClientReport
from fedclip.reports.listener import Listener
from fedclip.reports.tables import partition_table
from fedclip.reports.text import message, plain

_REFRESHES = 2
"""Drawings of the bars per second: the library's 10 take 3 % of a small run's processor time."""


class PlainProgress(Listener):
    """One line per event, for logs and pipes."""

    def __init__(self, console: Console | None = None) -> None:
        """Writes to the console, by default standard error."""
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._total = 0
        self._clock: _Clock | None = None

    def message(self, text: str) -> None:
        """Prints the text."""
        self._console.print(message(text))

    def partition(self, class_names: Sequence[str], counts: Mapping[str, Sequence[int]]) -> None:
        """Prints the table of examples per client and class."""
        self._console.print(partition_table(class_names, counts))

    def rounds(self, finished: int, total: int, clients_per_round: int) -> None:
        """Remembers how much lies ahead, for the estimate of the time left."""
        self._total = total
        self._clock = _Clock(total - finished)

    def round(self, record: Mapping[str, Any]) -> None:
        """Prints the round's figures, the time passed and left, and who was left out."""
        for fault in record.get("left_out", ()):
            self.message(left_out(record["server_round"], fault))
        times = self._clock.after_one_more() if self._clock and record["server_round"] else ""
        number = (
            f"round {record['server_round']}/{self._total}"
            if record["server_round"]
            else "before training"
        )
        self._console.print(message(f"{number}  {figures(record)}{times}"))


class LiveProgress(PlainProgress):
    """The same lines, which stay, and bars below them that go when they are full."""

    def __init__(self, console: Console | None = None) -> None:
        """Draws on the console, by default standard error."""
        super().__init__(console)
        self._progress = Progress(
            TextColumn("{task.description:<9}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=_REFRESHES,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}
        self._clients = self._heard = 0

    def __enter__(self) -> Self:
        """Starts drawing."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops drawing; the lines stay on the screen."""
        self._progress.stop()

    def images(self, done: int, total: int) -> None:
        """Moves the bar of decoded images."""
        self._move("images", done, total)

    def rounds(self, finished: int, total: int, clients_per_round: int) -> None:
        """Shows the bars of rounds and of the current round's clients."""
        super().rounds(finished, total, clients_per_round)
        self._move("rounds", finished, total)
        self._move("clients", 0, clients_per_round)
        self._clients, self._heard = clients_per_round, 0

    def steps(self, done: int, total: int) -> None:
        """Moves the bar of the round's clients while many of them train at once."""
        self._advance(self._clients * done / max(1, total))

    def client(self, report: ClientReport) -> None:
        """Moves the bar of the round's clients."""
        self._heard += 1
        note = plain(f"{report.client_id}: loss {report.loss:.3f}").plain
        self._progress.update(self._tasks["clients"], note=note)
        self._advance(self._heard)

    def round(self, record: Mapping[str, Any]) -> None:
        """Prints the round's line, moves the bar of rounds, and starts the next round's clients."""
        super().round(record)
        if record["server_round"]:
            self._move("rounds", record["server_round"], self._total)
            self._heard = 0
            last = record["server_round"] == self._total
            self._progress.update(self._tasks["clients"], visible=not last, completed=0, note="")

    def _advance(self, clients: float) -> None:
        """Moves the bar of clients forward, never back: steps may tell more than clients do."""
        bar = self._progress.tasks[self._tasks["clients"]]
        self._progress.update(bar.id, completed=max(clients, bar.completed))

    def _move(self, name: str, done: int, total: int) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, note="")
        self._progress.update(self._tasks[name], completed=done, total=total, visible=done < total)


class _Clock:
    """The time passed, and the time left by the mean of the rounds so far."""

    def __init__(self, rounds_left: int) -> None:
        self._started = time.monotonic()
        self._left = rounds_left
        self._done = 0

    def after_one_more(self) -> str:
        """Both as text, after one more round has finished."""
        self._done += 1
        self._left -= 1
        passed = time.monotonic() - self._started
        words = f"  {duration(passed)}"
        return words + (
            f", {duration(passed / self._done * self._left)} left" if self._left else ""
        )


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 2:
        return f"{hours:.1f} h"
    if minutes >= 2:
        return f"{minutes:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{round(seconds, 1):g} s"


def left_out(server_round: int, fault: Mapping[str, Any]) -> str:
    """A client that a round did without, and why, in one line."""
    return f"round {server_round}: left out: {fault['client']}: {fault['reason']}"


def figures(record: Mapping[str, Any]) -> str:
    """A round's figures in one line."""
    parts = []
    if record.get("loss") is not None:
        parts.append(f"loss {record['loss']:.3f}")
    if record.get("accuracy") is not None:
        parts.append(f"accuracy {record['accuracy']:.3f}")
    if clients := record.get("client_accuracy"):
        parts.append(f"clients {clients['min']:.2f}-{clients['max']:.2f}")
    return "  ".join(parts)


def make_progress(console: Console | None = None) -> Listener:
    """The display that suits the console: live on a terminal, plain lines elsewhere."""
    console = console or Console(stderr=True, highlight=False)
    return LiveProgress(console) if console.is_terminal else PlainProgress()
