"""What can go wrong, and the exit code that each kind ends a command with."""

from __future__ import annotations


class FedclipError(Exception):
    """A failure that a user reads as one message, without a traceback."""

    exit_code = 1


class UsageError(FedclipError):
    """Something that the user can mend: a key, a file, an adapter that does not fit."""

    exit_code = 2


class DamagedFile(UsageError):
    """A file whose bytes are not those that were written."""


class TrainingFailed(FedclipError):
    """A round that could not be finished; the last good state is kept."""

    exit_code = 1


class ProcessLost(FedclipError):
    """Another process of the same run is gone; the last good state is kept."""

    exit_code = 1


class FedclipWarning(UserWarning):
    """Advice that does not stop a run; the command line shows it as one line."""


def out_of_memory(who: str) -> TrainingFailed:
    """The failure of a client that does not fit into a GPU's memory, with what may help."""
    return TrainingFailed(
        f"{who}: does not fit into the GPU's memory; lower data.batch_size "
        "(data.accumulation_steps makes up for it), or set model.gradient_checkpointing: true"
    )
