"""The interface of a tracker, and what it is told of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

MOST_CLIENTS = 100
"""Clients of a round whose figures are logged one by one; those of more stay in the files."""
_ANSWER = 2.0  # seconds that a server has for its first answer, while the run goes on


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers know it: its folder, a key that stays the same on resume, its beginning.

    `config` is the configuration as JSON, `began` in seconds since 1970.
    """

    folder: Path
    key: str
    began: float
    config: Mapping[str, Any]


class Tracker(ABC):
    """Where a run's figures go; its methods are called in a thread that the run does not wait for.

    What a method raises becomes a warning, and after the next round the tracker is asked again.
    """

    packages: ClassVar[tuple[str, ...]] = ()  # what must be installed, by the names of imports
    extra: ClassVar[str] = ""  # what of fedclip installs them

    def __init__(self, run: TrackedRun) -> None:
        """Takes the run, whose folder is there; opens nothing."""
        self.run = run
        self.notes: list[str] = []  # warnings for the user
        self.answered = False  # whether the server, if there is one, has answered

    @property
    def place(self) -> str:
        """Where the figures go, in words."""
        return str(self.run.folder)

    @property
    def server(self) -> str | None:
        """The address of the server; None of a tracker that writes files."""
        return None

    def load(self) -> None:  # noqa: B027  # may be left out
        """Imports what is slow to import; of a tracker with a server once that has answered."""

    @abstractmethod
    def open(self) -> int:
        """Begins, or goes on with, the tracker's record of the run: its last round there, or -1."""

    @abstractmethod
    def log(self, server_round: int, figures: Mapping[str, float], at: float) -> None:
        """Logs a round, whole or not at all; `at` is its time in seconds since 1970."""

    def close(self, finished: bool) -> None:  # noqa: B027  # may be left out
        """Ends the record, of a run that has finished or was stopped."""

    def ask_server(self) -> None:
        """Raises OSError for a server that does not answer; what it answers is not looked at."""
        import httpx

        try:
            httpx.get(self.server or "", timeout=_ANSWER, verify=False)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = str(error) or type(error).__name__
            raise OSError(f"{self.server} does not answer ({why})") from None
        self.answered = True


def figures_of(record: Mapping[str, Any], times: Mapping[str, Any]) -> dict[str, float]:
    """A round's numbers by name: those of its line of `metrics.jsonl`, and its seconds.

    Names of nested figures are joined by `/`, as in `clients/hospital/loss`.
    """
    clients = ("clients", "accuracy_by_client")
    many = {key for key in clients if len(record.get(key) or ()) > MOST_CLIENTS}
    told = {k: v for k, v in record.items() if k not in many and k != "server_round"}
    if "left_out" in record:
        told["left_out"] = len(record["left_out"])
    return flat(told | {key: times.get(key) for key in ("seconds", "training_seconds")})


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a tree, by their path."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = value
    return found


def settings_of(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A configuration's values as text, by their keys in dots."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= settings_of(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value)
    return found
