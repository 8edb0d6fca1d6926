"""What a run writes at its start, and after every round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedclip.data.federated_data import private_record
from fedclip.experiment.build import check_partition
from fedclip.experiment.checkpoint import Checkpoint
from fedclip.experiment.context import RunContext
from fedclip.experiment.folder import PARTITION, RunFolder
from fedclip.experiment.openness import Openness
from fedclip.experiment.round_records import Judge, figures_of
from fedclip.experiment.stopwatch import Stopwatch
from fedclip.federated.rounds import RoundResult
from fedclip.reports.listener import Listener


@dataclass(frozen=True)
class OpenRun:
    """A run under way: what its rounds come from, and what they are written to."""

    context: RunContext
    folder: RunFolder
    checkpoint: Checkpoint
    listener: Listener
    privacy: Openness
    personal: bool
    clock: Stopwatch

    def figures(self, result: RoundResult, due: bool, judge: Judge | None = None) -> dict[str, Any]:
        """A round's figures, where they are due; see `figures_of`."""
        return figures_of(self.context, result, self.personal, due, judge)

    def write(self, record: dict[str, Any]) -> None:
        """Write a round's records and its checkpoint; times go to a separate file."""
        folder, checkpoint = self.folder, self.checkpoint
        record = self.privacy.public(folder, record)
        by_client = record.pop("seconds_by_client", {})
        checkpoint.finished_rounds = record["server_round"]
        if self.context.config.evaluation.keep_best and record["server_round"] > 0:
            checkpoint.keep_if_best(record)
        # Lines first: on resume they are cut back to the checkpoint, and never fall behind it.
        folder.append_metrics(record)
        folder.append_timing(
            {
                "server_round": record["server_round"],
                "seconds": self.clock.lap(),
                "training_seconds": sum(by_client.values()),
                "clients": by_client,
            }
        )
        checkpoint.save(folder)
        self.listener.round(record)


def record_partition(context: RunContext, folder: RunFolder, listener: Listener) -> None:
    """Write the partition, or check that a resumed run still has the data it began with.

    What a private run writes, and says, has no counts by class.
    """
    private = context.config.privacy.unit is not None
    if (folder.path / PARTITION).exists():
        check_partition({name: task.data for name, task in context.tasks.items()}, folder)
    else:
        record = context.partition_record()
        folder.write_json(PARTITION, private_record(record) if private else record)
    if private:
        return
    for task in context.tasks.values():
        listener.partition(*task.data.training_table())
