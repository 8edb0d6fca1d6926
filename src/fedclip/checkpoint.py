"""What the next round needs of the rounds before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedclip.records import State
from fedclip.runs import RunFolder


@dataclass
class Checkpoint:
    """How far a run has come.

    `finished_rounds` is -1 before the evaluation that precedes training, and `best` tells the
    round and validation accuracy of `best_state` where the run keeps it.
    """

    finished_rounds: int
    state: State
    best_state: State | None = None
    best: dict[str, Any] | None = None

    @classmethod
    def load(cls, folder: RunFolder) -> Checkpoint | None:
        """The run's last checkpoint; None where it has none yet."""
        found = folder.load_checkpoint()
        if found is None:
            return None
        tensors, meta = found
        homes: dict[str, dict[str, Any]] = {"state": {}, "best": {}}
        for path, tensor in tensors.items():
            home, _, name = path.partition("/")
            homes[home][name] = tensor
        return cls(meta["server_round"], homes["state"], homes["best"] or None, meta["best"])

    def save(self, folder: RunFolder) -> None:
        """Writes the checkpoint, whole or not at all."""
        tensors = {f"state/{name}": tensor for name, tensor in self.state.items()}
        tensors |= {f"best/{name}": tensor for name, tensor in (self.best_state or {}).items()}
        folder.save_checkpoint(tensors, {"server_round": self.finished_rounds, "best": self.best})

    def keep_if_best(self, record: Mapping[str, Any]) -> None:
        """Remembers the state of the best validation accuracy, the earliest of equals."""
        accuracy = record.get("validation_accuracy")
        if accuracy is None or (self.best and accuracy <= self.best["validation_accuracy"]):
            return
        self.best = {"server_round": record["server_round"], "validation_accuracy": accuracy}
        self.best_state = self.state
