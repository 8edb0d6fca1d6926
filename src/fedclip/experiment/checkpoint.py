"""What the next round needs of the rounds before it, on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedclip.errors import UsageError
from fedclip.experiment.folder import RunFolder
from fedclip.federated.rounds import RoundResult
from fedclip.records import RunState

_BEST = "best/"


@dataclass
class Checkpoint:
    """How far a run has come.

    `finished_rounds` is -1 before the evaluation that precedes training, and `best` tells the
    round and validation accuracy of `best_state` where the run keeps it. `bytes_up` and
    `bytes_down` are what has travelled so far, summed over clients.
    """

    finished_rounds: int
    state: RunState
    best_state: RunState | None = None
    best: dict[str, Any] | None = None
    bytes_up: int = 0
    bytes_down: int = 0

    @classmethod
    def load(cls, folder: RunFolder) -> Checkpoint | None:
        """The run's last checkpoint; None where it has none yet."""
        found = folder.load_checkpoint()
        if found is None:
            return None
        tensors, meta = found
        now = {name: t for name, t in tensors.items() if not name.startswith(_BEST)}
        best = {n.removeprefix(_BEST): t for n, t in tensors.items() if n.startswith(_BEST)}
        try:
            return cls(
                meta["server_round"],
                RunState.from_flat(now),
                RunState.from_flat(best) if best else None,
                meta["best"],
                meta["bytes_up"],
                meta["bytes_down"],
            )
        except KeyError as error:
            raise UsageError(
                f"{folder.path}: its checkpoint was written by another version of fedclip (it has "
                f"no {error}); finish the run with that version, or start a new one"
            ) from None

    def save(self, folder: RunFolder) -> None:
        """Writes the checkpoint, whole or not at all."""
        tensors = self.state.flat()
        if self.best_state is not None:
            tensors |= {_BEST + name: tensor for name, tensor in self.best_state.flat().items()}
        meta = {
            "server_round": self.finished_rounds,
            "best": self.best,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
        }
        folder.save_checkpoint(tensors, meta)

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
