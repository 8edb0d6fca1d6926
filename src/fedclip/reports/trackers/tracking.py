"""Hand a run's figures to trackers: what the run has written, and nothing else.

Every tracker works in a thread of its own. A round that a tracker lacks, after a kill or while its
server was away, is taken from `metrics.jsonl`; one that it has is never logged again.
"""

from __future__ import annotations

import json
import re
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from fedclip import files
from fedclip.config import Config
from fedclip.config.lookup import load
from fedclip.errors import FedclipWarning, UsageError, install
from fedclip.reports.listener import Listener, Listeners
from fedclip.reports.trackers.tracker import TrackedRun, Tracker, figures_of
from fedclip.reports.trackers.worker import Worker

KEY = "tracking"
_RECORD = "tracking.json"
_METRICS, _TIMING = "metrics.jsonl", "timing.jsonl"
_TRACKED = re.compile(r"[0-9a-f]{32}")


def tracker_classes(config: Config) -> dict[str, type[Tracker] | type[Listener]]:
    """The classes that `tracking` names; UsageError where one is none, or lacks a package."""
    found = {}
    for name in config.tracking:
        own = load("trackers", name, KEY)
        if not (isinstance(own, type) and issubclass(own, Tracker | Listener)):
            raise UsageError(
                f"{KEY}: {name} must be a class derived from fedclip.reports.trackers.Tracker or "
                f"fedclip.Listener, got {own!r}"
            )
        if issubclass(own, Tracker):
            _check_installed(name, own)
        found[name] = own
    return found


def _check_installed(name: str, own: type[Tracker]) -> None:
    missing = [package for package in own.packages if find_spec(package) is None]
    if missing:
        how = install(own.extra) if own.extra else "install it"
        raise UsageError(
            f"{KEY}: {name} needs the Python package {' and '.join(missing)}, which is not there; "
            f"{how}, or leave {name} out of {KEY}"
        )


def tracked(config: Config, folder: Path, say: Callable[[str], None]) -> Listeners:
    """All that a run's `tracking` names as one listener; a user's listeners first."""
    classes = tracker_classes(config).items()
    listeners = [_made(name, own) for name, own in classes if issubclass(own, Listener)]
    trackers = {name: own for name, own in classes if issubclass(own, Tracker)}
    return Listeners([*listeners, Tracking(trackers, folder, say)] if trackers else listeners)


def _made(name: str, own: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return own(*arguments)
    except Exception as error:
        raise UsageError(f"{KEY}: {name} cannot be made: {error!r}") from error


class Tracking(Listener):
    """Tells trackers of each round what its lines in the run folder tell."""

    def __init__(
        self, classes: Mapping[str, type[Tracker]], folder: Path, say: Callable[[str], None]
    ) -> None:
        """Takes the trackers' classes by name; `say` shows a line to the user."""
        self._classes, self._folder, self._say = classes, folder, say
        self._metrics, self._timing = _Lines(folder / _METRICS), _Lines(folder / _TIMING)
        self._workers: dict[str, Worker] = {}
        self._lines: list[tuple[dict[str, float], float]] = []
        self._at = 0.0
        self._finished = False

    def start(self, config: Config) -> None:
        """Imports what the trackers need, and says how long that took."""
        run = _tracked_run(self._folder, config)
        self._at = run.began
        for name, own in self._classes.items():
            tracker = _made(name, own, run)
            self._workers[name] = Worker(tracker, self._lines)
            try:
                seconds = self._workers[name].begin()
            except Exception as error:
                raise UsageError(f"{KEY}: {name} cannot be loaded: {error!r}") from error
            if seconds is not None:
                where = _without_password(tracker.place)
                self._say(f"{KEY}: {name} to {where} (loaded in {seconds:.1f} s)")
        self._warn()

    def rounds(self, finished: int, total: int, clients_per_round: int) -> None:
        """Has the trackers log what they lack of the rounds before a resume."""
        self._follow()

    def round(self, record: Mapping[str, Any]) -> None:
        """Has the trackers log what the run has just written."""
        self._follow()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Remembers that the run has come to its end."""
        self._finished = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the trackers' records: waits for files, and for a server while it answers."""
        for worker in self._workers.values():
            worker.end(self._finished)
        for worker in self._workers.values():
            worker.wait()
        self._warn()

    def _follow(self) -> None:
        first = not self._lines
        for record, times in zip(self._metrics.new(), self._timing.new(), strict=False):
            seconds = times.get("seconds")
            self._at += seconds if isinstance(seconds, int | float) else 0.0
            self._lines.append((figures_of(record, times), self._at))
        for worker in self._workers.values():
            worker.go_on()
        for worker in self._workers.values() if first else ():
            if worker.tracker.server is None:  # making files is no part of the rounds' time
                worker.wait()
        self._warn()

    def _warn(self) -> None:
        for name, worker in self._workers.items():
            for text in worker.new_notes():
                text = f"{KEY}: {name}: {_without_password(text)}"
                warnings.warn(text, FedclipWarning, stacklevel=2)


def _without_password(text: str) -> str:
    """A text whose addresses name no user and no password."""
    return re.sub(r"://[^/\s@]+@", "://", text)


class _Lines:
    """The lines of a growing file."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def new(self) -> list[dict[str, Any]]:
        """What was not yet read."""
        with files.open_regular(self._path) as file:
            file.seek(self._read)
            lines = file.read().splitlines()
            self._read = file.tell()
        return [files.parse_json(line, str(self._path)) for line in lines]


def _tracked_run(folder: Path, config: Config) -> TrackedRun:
    """The run as trackers know it; at its start it is given a key, which stays in its folder."""
    path = folder / _RECORD
    if not path.exists():
        record = {"run": uuid.uuid4().hex, "began": round(time.time(), 3)}
        files.replace_file(path, json.dumps(record).encode() + b"\n")
    found = files.read_json(path)
    key, began = (found.get(k) if isinstance(found, dict) else None for k in ("run", "began"))
    known = isinstance(key, str) and _TRACKED.fullmatch(key)
    if known and isinstance(began, float) and 0 < began < 1e11:
        return TrackedRun(folder, str(key), began, config.model_dump(mode="json"))
    raise UsageError(
        f"{path} is damaged: expected the run's key and its beginning; put the file back, or "
        "remove it, and trackers begin a new record"
    )
