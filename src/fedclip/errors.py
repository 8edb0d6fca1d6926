"""What can go wrong, the exit code that it ends a command with, and how names are shown."""

from __future__ import annotations

import unicodedata
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class FedclipError(Exception):
    """A failure that a user reads as one message, without a traceback."""

    exit_code = 1


class UsageError(FedclipError):
    """Something that the user can mend: a key, a file, an adapter that does not fit."""

    exit_code = 2


class DamagedFile(UsageError):
    """A file whose bytes have changed since it was written."""


class TrainingFailed(FedclipError):
    """A round that could not be finished; the last good state is kept."""

    exit_code = 1


class ProcessLost(FedclipError):
    """Another process of the same run is gone; the last good state is kept."""

    exit_code = 1


class FedclipWarning(UserWarning):
    """Advice that does not stop a run; the command line shows it as one line."""


def install(extra: str) -> str:
    """How to get an extra's packages, for messages: no package index has fedclip."""
    wheel = f"fedclip-{version('fedclip')}-py3-none-any.whl"
    return (
        f"install fedclip's extra {extra}: `pip install -e '.[{extra}]'` in its checkout, or "
        f"`pip install './{wheel}[{extra}]'` of its wheel"
    )


def out_of_memory(who: str) -> TrainingFailed:
    """The failure of a client that does not fit into a GPU's memory, with what may help."""
    return TrainingFailed(
        f"{who}: does not fit into the GPU's memory; lower data.batch_size "
        "(data.accumulation_steps makes up for it), or set model.gradient_checkpointing: true"
    )


def first_fault(error: ValidationError) -> str:
    """The first thing that does not fit a record's shape: where it stands, and what is wrong."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def shortened(text: object, longest: int = 60) -> str:
    """A name in quotes for a message: short, and with control characters as escapes."""
    try:
        shown = repr(text)
    except (ValueError, RecursionError):  # a whole number of thousands of digits, a deep nesting
        shown = f"a {type(text).__name__} too long to show"
    return shown if len(shown) <= longest else f"{shown[: longest - 4]}...'"


def harmless(text: str, *, lines: bool = True) -> str:
    """A text that cannot steer a terminal: what is not printable as an escape, such as `\\x1b`.

    Line breaks stay, unless `lines` is false.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or _is_quiet(c) or (lines and c == "\n") else _escaped(c) for c in text
    )


def one_line(text: str, longest: int = 400) -> str:
    """What somebody else wrote, as one short line for a log: cut, control characters as escapes."""
    shown = harmless(text[: longest + 1], lines=False)
    return shown if len(shown) <= longest else f"{shown[: longest - 4]} ..."


def _is_quiet(character: str) -> bool:
    """Blanks of all widths, and what joins letters in some scripts."""
    return unicodedata.category(character) == "Zs" or character in "\u200c\u200d"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", errors="backslashreplace").decode()
