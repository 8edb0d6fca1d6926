"""The run folder: every file in it appears whole or not at all, so a kill loses no finished round.

A round appends its metrics and then replaces the checkpoint; a resumed run cuts the metrics back to
the checkpoint's round. `summary.json` comes last: where it exists, the run is finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from fedclip import files
from fedclip.errors import FedclipError, UsageError
from fedclip.experiment import lock
from fedclip.records import plain_json

if TYPE_CHECKING:
    import torch

CONFIG = "config.yaml"
PARTITION = "partition.json"
METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
TOLD = "told.jsonl"
SUMMARY = "summary.json"
PREDICTIONS = "predictions.json"
REPORT = "report.html"
CHECKPOINT = "checkpoint.safetensors"
PREVIOUS = "checkpoint_previous.safetensors"
DEPLOY = "deploy"
_LOCK = ".lock"

PATIENCE = "evaluation.patience"
"""What the reason of a run begins with that this key has ended, and that is not gone on with."""


class RunFolder:
    """One run's files. `create` and `open` check the folder; `exclusive` keeps others out."""

    def __init__(self, path: Path | str) -> None:
        """Name a folder without looking at it."""
        self.path = Path(path)

    @classmethod
    def create(cls, path: Path | str, config_yaml: str) -> RunFolder:
        """Make a new run folder that holds its configuration from the first moment."""
        cls.check_free(path)
        folder = cls(path)
        if folder.path.exists():  # and is empty
            folder.write_text(CONFIG, config_yaml)
            return folder
        with folder._told(folder.path):
            folder.path.parent.mkdir(parents=True, exist_ok=True)
            with files.draft_folder(folder.path.parent) as draft:
                files.write_synced(draft / CONFIG, config_yaml.encode())
                draft.rename(folder.path)
            files.sync(folder.path.parent)
        return folder

    @classmethod
    def check_free(cls, path: Path | str) -> None:
        """Refuse a path at which no new run can be made."""
        folder = cls(path)
        if folder.is_run():
            raise UsageError(
                f"{path} already holds a run; go on with it by "
                f"`fedclip run --resume {path}`, or choose another --output"
            )
        if folder.path.exists() and not folder.path.is_dir():
            raise UsageError(f"{path} is a file; choose another --output")
        entries = folder.path.iterdir() if folder.path.is_dir() else ()
        if any(not entry.name.startswith(files.PART) for entry in entries):
            raise UsageError(f"{path} is not empty and holds no run; choose a new or empty folder")

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """Take up an existing run folder."""
        folder = cls(path)
        if not folder.is_run():
            what = "has no config.yaml" if folder.path.is_dir() else "is not a folder"
            if not folder.path.exists():
                what = "does not exist"
            raise UsageError(
                f"{path} is not a run folder: it {what}; name a folder that `fedclip run` made"
            )
        return folder

    def is_run(self) -> bool:
        """Say whether the folder holds a run, in whatever state."""
        return (self.path / CONFIG).is_file()

    def is_finished(self) -> bool:
        """Say whether the run came to its end."""
        return (self.path / SUMMARY).is_file()

    def is_coordinated(self) -> bool:
        """Say whether it is a coordinator's run, whose clients are on other machines."""
        return (self.path / DEPLOY).is_dir()

    def has_rounds_left(self) -> bool:
        """Say whether a resume has work to do; it has after a listener's early end, too."""
        if not self.is_finished():
            return True
        summary = self.read_json(SUMMARY)
        reason = summary.get("stopped_by") if isinstance(summary, Mapping) else None
        return reason is not None and not str(reason).startswith(PATIENCE)

    def reopen(self) -> None:
        """Take back the summary of a run that goes on: it is not finished any more."""
        with self._told(self.path / SUMMARY):
            (self.path / SUMMARY).unlink(missing_ok=True)

    @contextmanager
    def exclusive(self) -> Iterator[RunFolder]:
        """Keep other processes from working on this run; a killed holder is no obstacle."""
        with self._told(self.path / _LOCK):
            (self.path / _LOCK).touch()
        taken = f"another process is working on {self.path}; wait for it or end it first"
        with lock.exclusive(self.path / _LOCK, taken):
            files.remove_parts(self.path)
            yield self

    # Whole files

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Replace a file in one step."""
        target = self.path / name
        with self._told(target):
            files.replace_file(target, data)
        return target

    def write_text(self, name: str, text: str) -> Path:
        """Replace a text file in one step."""
        return self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> Path:
        """Replace a JSON file in one step; numbers that JSON cannot hold become null."""
        text = json.dumps(plain_json(value), indent=2, ensure_ascii=False, allow_nan=False)
        return self.write_text(name, text + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON file of the run."""
        if not (self.path / name).exists():
            raise UsageError(f"{self.path} has no {name}")
        return files.read_json(self.path / name)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Lend a path in the run to someone who writes there; a full disk becomes a message."""
        with self._told(self.path / name):
            yield self.path / name

    # Lines by round

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a round's metrics; the record needs `server_round`."""
        self._append(METRICS, record)

    def append_timing(self, record: Mapping[str, Any]) -> None:
        """Add a round's durations; the record needs `server_round`."""
        self._append(TIMING, record)

    def append_told(self, record: Mapping[str, Any]) -> None:
        """Add what a private run tells outside its guarantee; the record needs `server_round`."""
        self._append(TOLD, record)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the metrics of all finished rounds."""
        return [record for _, record in self._lines(METRICS)]

    def read_timing(self) -> list[dict[str, Any]]:
        """Read the durations of all finished rounds."""
        return [record for _, record in self._lines(TIMING)]

    def metrics_sha256(self) -> str:
        """Digest of the lines of metrics so far."""
        lines = self._read(METRICS) if (self.path / METRICS).exists() else b""
        return hashlib.sha256(lines).hexdigest()

    def truncate_metrics(self, last_round: int, sha256: str | None = None) -> None:
        """Drop metrics and durations after a round (-1: all) and any half-written last line.

        Raises `UsageError` where lines are missing, or the metrics that stay do not have the
        digest `sha256`.
        """
        for name in (METRICS, TIMING, TOLD):
            path = self.path / name
            if name == TOLD and not path.exists():
                continue
            kept = [line for line, _ in self._lines(name)[: last_round + 1]]
            if len(kept) <= last_round:
                raise UsageError(
                    f"{path} ends before round {last_round}, which is finished; put the file back"
                )
            data = b"".join(kept)
            if name == METRICS and sha256 and hashlib.sha256(data).hexdigest() != sha256:
                raise UsageError(
                    f"{path} is damaged: lines up to round {last_round} are not those that were "
                    "written; put the file back, or start a new run"
                )
            if path.exists() and data != self._read(name):
                self.write_bytes(name, data)

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        assert "server_round" in record
        target = self.path / name
        with self._told(target):
            files.append_line(target, _line(record))

    def _lines(self, name: str) -> list[tuple[bytes, dict[str, Any]]]:
        """Whole lines and what they say, which must be of round 0, 1, 2 and so on."""
        if not (self.path / name).exists():
            return []
        lines = self._read(name).split(b"\n")[:-1]  # the last is empty, or was cut off
        found = []
        for number, line in enumerate(lines):
            where = f"{self.path / name}, line {number + 1}"
            record = files.parse_json(line, where)
            server_round = record.get("server_round") if isinstance(record, dict) else None
            if type(server_round) is not int or server_round != number:
                raise UsageError(f"{where} is damaged: expected the record of round {number}")
            found.append((line + b"\n", record))
        return found

    # The checkpoint

    def save_checkpoint(self, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Replace the checkpoint, tensors and JSON-able facts, and keep the one before it."""
        from fedclip.experiment.checkpoint_file import checkpoint_bytes

        target = self.path / CHECKPOINT
        with self._told(target):
            data = checkpoint_bytes(tensors, meta)
            files.replace_file(target, data, previous=self.path / PREVIOUS)

    def load_checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Read the checkpoint; None before the first finished round."""
        from fedclip.experiment.checkpoint_file import read_checkpoint

        path = self.path / CHECKPOINT
        return read_checkpoint(path) if path.exists() else None

    # Helpers

    def _read(self, name: str) -> bytes:
        try:
            with files.open_regular(self.path / name) as file:
                return file.read()
        except FileNotFoundError:
            raise UsageError(f"{self.path} has no {name}") from None
        except OSError as error:
            raise UsageError(f"{self.path / name} cannot be read: {error.strerror}") from None

    @contextmanager
    def _told(self, target: Path) -> Iterator[None]:
        """Turn an operating system's error into a message that names the file."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            message = f"{target} cannot be written: {getattr(error, 'strerror', None) or error}"
            if self.is_run():
                message += (
                    "; the last good state is kept: mend this, then go on by "
                    f"`fedclip run --resume {self.path}`"
                )
            raise FedclipError(message) from error


def next_folder(stem: str, root: Path | str = "runs") -> Path:
    """Name the next free run folder, `runs/<stem>-<n>`."""
    taken = [
        int(path.name.removeprefix(f"{stem}-"))
        for path in Path(root).glob(f"{stem}-*")
        if path.name.removeprefix(f"{stem}-").isdecimal()
    ]
    return Path(root) / f"{stem}-{max(taken, default=0) + 1}"


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(plain_json(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
