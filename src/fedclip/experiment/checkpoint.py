"""What the next round needs of the rounds before it, on disk, and what run that belongs to."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedclip.errors import DamagedFile, FedclipWarning, UsageError, first_fault
from fedclip.experiment.checkpoint_file import read_checkpoint
from fedclip.experiment.folder import CHECKPOINT, PREVIOUS, RunFolder
from fedclip.federated.rounds import RoundResult
from fedclip.records import RunState

_BEST = "best/"


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class _Best(_Strict):
    server_round: int = Field(ge=1)
    validation_accuracy: float


class _Identity(_Strict):
    run: str
    config: dict[str, Any]
    base_sha256: str
    data_sha256: str
    layout_sha256: str
    code: dict[str, str]
    training: int = 1  # checkpoints of the first kind do not say it
    environment: dict[str, Any]


class _Facts(_Strict):
    """What a checkpoint's metadata holds, beside its format and digest."""

    server_round: int = Field(ge=0)
    best: _Best | None
    bytes_up: int = Field(ge=0)
    bytes_down: int = Field(ge=0)
    metrics_sha256: str
    identity: _Identity


@dataclass
class Checkpoint:
    """How far a run has come.

    `finished_rounds` is -1 before the evaluation that precedes training, and `best` tells the
    round and validation accuracy of `best_state` where the run keeps it. `bytes_up` and
    `bytes_down` are what has travelled so far, summed over clients. `identity` says what run this
    belongs to (`experiment.identity`), `metrics_sha256` what its `metrics.jsonl` held.
    """

    finished_rounds: int
    state: RunState
    best_state: RunState | None = None
    best: dict[str, Any] | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    identity: Mapping[str, Any] = field(default_factory=dict)
    metrics_sha256: str | None = None

    @classmethod
    def load(cls, folder: RunFolder) -> Checkpoint | None:
        """The run's last checkpoint; None where it has none yet, `UsageError` for a damaged one."""
        path = folder.path / CHECKPOINT
        return cls._read(path) if path.exists() else None

    @classmethod
    def load_usable(cls, folder: RunFolder, *, warn: bool = True) -> Checkpoint | None:
        """The last checkpoint, or the one before it where the last is damaged or missing."""
        last, before = folder.path / CHECKPOINT, folder.path / PREVIOUS
        if not last.exists():
            return cls._read(before) if before.exists() else None
        try:
            return cls._read(last)
        except DamagedFile as damage:
            if not before.exists():
                raise UsageError(
                    f"{damage}; there is no {before.name} to go on from: put the file back, or "
                    "start a new run"
                ) from None
            try:
                found = cls._read(before)
            except DamagedFile as second:
                raise UsageError(
                    f"{damage}; and {second}; put one of the two back, or start a new run"
                ) from None
            if warn:
                warnings.warn(
                    f"{damage}; going on from {before}, the end of round {found.finished_rounds}",
                    FedclipWarning,
                    stacklevel=2,
                )
            return found

    @classmethod
    def _read(cls, path: Path) -> Checkpoint:
        tensors, values = read_checkpoint(path)
        now = {name: t for name, t in tensors.items() if not name.startswith(_BEST)}
        best = {n.removeprefix(_BEST): t for n, t in tensors.items() if n.startswith(_BEST)}
        try:
            facts = _Facts.model_validate(values)
            state = RunState.from_flat(now)
            best_state = RunState.from_flat(best) if best else None
        except ValidationError as error:
            raise UsageError(f"{path} is no checkpoint: {first_fault(error)}") from None
        except KeyError as error:
            raise UsageError(f"{path} is no checkpoint: it has a tensor in {error}") from None
        return cls(
            facts.server_round,
            state,
            best_state,
            None if facts.best is None else facts.best.model_dump(),
            facts.bytes_up,
            facts.bytes_down,
            facts.identity.model_dump(),
            facts.metrics_sha256,
        )

    def save(self, folder: RunFolder) -> None:
        """Writes the checkpoint, whole or not at all, and keeps the one before it."""
        tensors = self.state.flat()
        if self.best_state is not None:
            tensors |= {_BEST + name: tensor for name, tensor in self.best_state.flat().items()}
        facts = {
            "server_round": self.finished_rounds,
            "best": self.best,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "metrics_sha256": folder.metrics_sha256(),
            "identity": self.identity,
        }
        folder.save_checkpoint(tensors, facts)

    def add(self, result: RoundResult) -> None:
        """Takes in a finished round's state and traffic."""
        self.state = result.state
        self.bytes_up += result.bytes_up
        self.bytes_down += result.bytes_down

    def keep_if_best(self, record: Mapping[str, Any]) -> None:
        """Remembers the state of the best validation accuracy, the earliest of equals."""
        accuracy = record.get("validation_accuracy")
        if accuracy is None or (self.best and accuracy <= self.best["validation_accuracy"]):
            return
        self.best = {"server_round": record["server_round"], "validation_accuracy": accuracy}
        now = self.state
        ranks = {name: t for name, t in now.server.items() if name.startswith("rank/")}
        self.best_state = replace(now, server=ranks, news=None)
