"""Early stopping: a run ends when validation accuracy has not improved for some evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedclip.experiment.folder import PATIENCE


class Patience:
    """Decides after each round, from its records alone, so that a resumed run decides the same.

    Counted are evaluated rounds from the first on; the best is the earliest of equals, as with
    `evaluation.keep_best`. A `limit` of None never ends a run, and its last round is no early end.
    """

    def __init__(
        self, limit: int | None, rounds: int, records: Iterable[Mapping[str, Any]]
    ) -> None:
        """Take the total number of rounds, and the records of the finished ones."""
        self._limit, self._rounds, self._round = limit, rounds, 0
        self._best: tuple[int, float] | None = None  # its round and accuracy
        self._since = 0
        for record in records:
            self.hear(record)

    def hear(self, record: Mapping[str, Any]) -> bool:
        """Take in the next round's record, and say whether the run ends with it."""
        self._round, accuracy = record["server_round"], record.get("validation_accuracy")
        if self._round > 0 and accuracy is not None:
            if self._best is None or accuracy > self._best[1]:
                self._best, self._since = (self._round, accuracy), 0
            else:
                self._since += 1
        return self.reason is not None

    @property
    def reason(self) -> str | None:
        """Why the run ends here; None to go on."""
        if self._limit is None or self._best is None or self._since < self._limit:
            return None
        if self._round >= self._rounds:
            return None
        return (
            f"{PATIENCE}: no better validation accuracy than round {self._best[0]}'s "
            f"({self._best[1]:.3f}) in {self._since} evaluations"
        )
