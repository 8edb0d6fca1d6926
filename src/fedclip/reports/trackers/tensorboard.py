"""TensorBoard: event files in the run folder, for `tensorboard --logdir runs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from fedclip.reports.trackers.tracker import Tracker

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

_FILES = "events.out.tfevents.*"


class TensorBoard(Tracker):
    """Writes event files into `tensorboard/`; on resume anew, from the run's own lines."""

    packages: ClassVar[tuple[str, ...]] = ("tensorboard",)
    extra: ClassVar[str] = "tensorboard"
    _writer: EventFileWriter

    @property
    def place(self) -> str:
        """The folder of the event files."""
        return str(self.run.folder / "tensorboard")

    def load(self) -> None:
        """Imports the writer."""
        import tensorboard.compat.proto.event_pb2
        import tensorboard.summary.writer.event_file_writer  # noqa: F401

    def open(self) -> int:
        """Removes what a run before the resume has written, which all comes again."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        for file in (self.run.folder / "tensorboard").glob(_FILES):
            file.unlink()
        self._writer = EventFileWriter(self.place)
        return -1

    def log(self, server_round: int, figures: Mapping[str, float], at: float) -> None:
        """Writes one event with all figures, so that no part of a round is ever missing."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._writer.add_event(
            Event(step=server_round, wall_time=at, summary=Summary(value=values))
        )
        self._writer.flush()

    def close(self, finished: bool) -> None:
        """Closes the file."""
        self._writer.close()
