"""Files through which the coordinator and the round-loop process communicate.

<run>/deploy/    run.json        the run's number in all messages, drawn once
                 sites.json      the sites that have come, with their numbers of examples
                 progress.log    what a person may want to read
                 bytes.jsonl     bytes of the messages of each round
                 failure.json    why the run could not go on, if it could not
                 flower/         Flower's own files: its database, its logs
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from fedclip import files
from fedclip.errors import FedclipError, UsageError, first_fault, harmless
from fedclip.experiment.folder import DEPLOY

_SHAPES: dict[str, TypeAdapter[Any]] = {
    "run.json": TypeAdapter(Annotated[dict[Literal["run"], str], Field(min_length=1)]),
    "sites.json": TypeAdapter(dict[str, Annotated[int, Field(ge=0)]]),
    "failure.json": TypeAdapter(
        Annotated[dict[Literal["message", "usage"], str | bool], Field(min_length=2)]
    ),
}


class DeployFiles:
    """The files of one run."""

    def __init__(self, run: Path) -> None:
        self.folder = run / DEPLOY
        self.progress = self.folder / "progress.log"
        self.bytes = self.folder / "bytes.jsonl"
        self.flower = self.folder / "flower"

    def create(self) -> None:
        """Makes the folder, and draws the run's number, unless that has been done."""
        self.flower.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (self.folder / "run.json").exists():
            self._write("run.json", {"run": secrets.token_hex(8)})

    @property
    def run(self) -> str:
        """The run's number."""
        return str(self._read("run.json")["run"])

    @property
    def sites(self) -> dict[str, int]:
        """The sites that have come so far; empty at first."""
        path = self.folder / "sites.json"
        return self._read(path.name) if path.exists() else {}

    def keep_sites(self, sites: dict[str, int]) -> None:
        """Writes the sites that have come."""
        known = {name: count for name, count in sorted(sites.items()) if count}
        if known != self.sites:
            self._write("sites.json", known)

    def say(self, text: str) -> None:
        """Adds lines for a person to read."""
        with self.progress.open("a", encoding="utf-8") as file:
            file.write(harmless(text).rstrip("\n") + "\n")

    def note_bytes(self, record: dict[str, Any]) -> None:
        """Adds a line of bytes."""
        files.append_line(self.bytes, (json.dumps(record) + "\n").encode())

    def fail(self, error: FedclipError) -> None:
        """Writes why the run could not go on."""
        usage = isinstance(error, UsageError)
        self._write("failure.json", {"message": str(error), "usage": usage})

    def failure(self) -> FedclipError | None:
        """Why the run could not go on; None where it is not known to have failed."""
        if not (self.folder / "failure.json").exists():
            return None
        found = self._read("failure.json")
        return (UsageError if found["usage"] else FedclipError)(str(found["message"]))

    def forget_failure(self) -> None:
        """A new attempt begins."""
        (self.folder / "failure.json").unlink(missing_ok=True)

    def _write(self, name: str, value: Any) -> None:
        files.replace_file(self.folder / name, (json.dumps(value) + "\n").encode())

    def _read(self, name: str) -> Any:
        path = self.folder / name
        found = files.read_json(path)
        try:
            return _SHAPES[name].validate_python(found, strict=True)
        except ValidationError as error:
            raise UsageError(f"{path} is damaged: {first_fault(error)}; put it back") from None
