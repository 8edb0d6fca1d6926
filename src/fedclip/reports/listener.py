"""Observers of a run: the base class, and the fan-out to several of them.

Progress displays and trackers are listeners. What one of them raises ends the run, and the last
checkpoint stays: an error is never swallowed, and `resume` goes on from the last finished round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from fedclip.errors import UsageError
from fedclip.records import ClientReport

if TYPE_CHECKING:
    from fedclip.config import Config


class Listener:
    """Observer of run events; the base class ignores them all.

    A run enters it as a context, then calls `start`, `rounds`, for each finished round `round` and
    `stop`, and at the end `finish`; `message`, `images`, `partition` and `client` come in between.
    A resumed run starts anew, with the rounds that are finished in `rounds`.
    """

    def __enter__(self) -> Self:
        """Begins to listen, before data are loaded."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends, also after an error."""

    def start(self, config: Config) -> None:
        """The run begins or is resumed; `config` has `auto` and empty keys filled in."""

    def message(self, text: str) -> None:
        """A line worth reading, for example which stage begins."""

    def images(self, done: int, total: int) -> None:
        """So many images have been decoded."""

    def partition(self, class_names: Sequence[str], counts: Mapping[str, Sequence[int]]) -> None:
        """How many training examples of each class each client holds."""

    def rounds(self, finished: int, total: int, clients_per_round: int) -> None:
        """The round loop begins, after so many finished rounds."""

    def steps(self, done: int, total: int) -> None:
        """So many of a round's optimizer steps are done; called from any thread."""

    def client(self, report: ClientReport) -> None:
        """A client has finished its part of the current round, as `ClientReport` tells."""

    def round(self, record: Mapping[str, Any]) -> None:
        """A round is finished and its checkpoint saved; `record` is its line of `metrics.jsonl`.

        First called for round 0, the untrained model.
        """

    def stop(self) -> str | None:
        """Why the run shall end after the round just heard of; None, the default, to go on.

        Asked after every finished round but the last. The run then ends as after its last round,
        with adapter and summary, and the reason is the summary's `stopped_by`; `resume` goes on.
        """
        return None

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run has ended and everything is written; `summary` is that of `summary.json`."""


class Callback(Listener):
    """A function as a listener, called with each round's record; what it returns is passed over."""

    def __init__(self, function: Callable[[Mapping[str, Any]], Any]) -> None:
        """Takes the function."""
        self._function = function

    def round(self, record: Mapping[str, Any]) -> None:
        """Calls the function."""
        self._function(record)


Heard = Listener | Callable[[Mapping[str, Any]], Any]
"""What may listen to a run: a listener, or a function of each round's record."""


class Listeners(Listener):
    """Several listeners as one: each hears of every event, in the order given."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        """Takes the listeners, progress first."""
        self._listeners = tuple(listeners)
        self._entered = ExitStack()

    @classmethod
    def of(cls, given: Heard | Sequence[Heard] | None) -> Self:
        """One listener or function, several or none as one; UsageError for anything else."""
        several: Sequence[Any] = given if isinstance(given, list | tuple) else [given]
        listeners: list[Any] = [] if given is None else list(several)
        for one in listeners:
            if isinstance(one, type) or not (isinstance(one, Listener) or callable(one)):
                raise UsageError(
                    "listener must be an instance of a class derived from fedclip.Listener, a "
                    f"function of each round's record, or a list of them, got {one!r}"
                )
        return cls([one if isinstance(one, Listener) else Callback(one) for one in listeners])

    def __enter__(self) -> Self:
        """Enters all; if one fails, those before it are left again."""
        with ExitStack() as stack:
            for listener in self._listeners:
                stack.enter_context(listener)
            self._entered = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves all, the last one first."""
        self._entered.__exit__(kind, error, trace)

    def start(self, config: Config) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.start(config)

    def message(self, text: str) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.message(text)

    def images(self, done: int, total: int) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.images(done, total)

    def partition(self, class_names: Sequence[str], counts: Mapping[str, Sequence[int]]) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.partition(class_names, counts)

    def rounds(self, finished: int, total: int, clients_per_round: int) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.rounds(finished, total, clients_per_round)

    def steps(self, done: int, total: int) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.steps(done, total)

    def client(self, report: ClientReport) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.client(report)

    def round(self, record: Mapping[str, Any]) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.round(record)

    def stop(self) -> str | None:
        """The first reason that any gives; all are asked. UsageError for what is no reason."""
        reasons = [(listener, listener.stop()) for listener in self._listeners]
        for listener, reason in reasons:
            if not (reason is None or (isinstance(reason, str) and reason)):
                raise UsageError(
                    f"{type(listener).__name__}.stop() must return the reason as text, or None to "
                    f"go on; got {reason!r}"
                )
        return next((reason for _, reason in reasons if reason is not None), None)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.finish(summary)
