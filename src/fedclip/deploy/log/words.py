"""Events of a site's log in words, for its terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedclip import files
from fedclip.deploy.log.chain import body_of


def in_words(body: Mapping[str, Any]) -> str | None:
    """An event as a sentence; None for what a person need not see."""
    said = {"joined": _joined, "refused": _refused, "asked": _asked, "sent": _sent, "ended": _ended}
    say = said.get(str(body.get("event")))
    return None if say is None else say(body)


def _joined(body: Mapping[str, Any]) -> str:
    epsilon = body.get("epsilon")
    promise = "no differential privacy" if epsilon is None else f"epsilon {epsilon:g}"
    return (
        f"takes part in the run {body['run']} ({body['agreed']}): {body['rounds']} rounds, "
        f"{body['examples']} training examples here, {promise}"
    )


def _refused(body: Mapping[str, Any]) -> str:
    return f"refused: {body['reason']}"


def _asked(body: Mapping[str, Any]) -> str:
    return f"round {body['round']}: training"


def _sent(body: Mapping[str, Any]) -> str:
    loss = "unknown" if body["loss"] is None else f"{body['loss']:.3f}"
    return (
        f"round {body['round']}: loss {loss}, {body['seconds']:.1f} s, {body['bytes']:,} bytes sent"
    )


def _ended(body: Mapping[str, Any]) -> str:
    return (
        f"the run has ended: {body['correct']} of {body['tests']} test images here are recognised; "
        f"the adapter is in {body['adapter']}"
    )


class Follower:
    """Reads what is added to a log that other processes write."""

    def __init__(self, path: Path) -> None:
        """Begins at the end of the log as it is now."""
        self._path = path
        self._position = path.stat().st_size if path.exists() else 0

    def news(self) -> Iterator[dict[str, Any]]:
        """What has been added since the last call, whole lines only."""
        if not self._path.exists():
            return
        with files.open_regular(self._path) as file:
            file.seek(self._position)
            added = file.read().rpartition(b"\n")[0]
        self._position += len(added) + 1 if added else 0
        for line in added.splitlines():
            if (body := body_of(line)) is not None:
                yield body
