"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from fedclip.errors import UsageError

PART = ".part-"
"""Files and folders that are still being written begin so; a kill may leave some behind."""


def replace_file(target: Path, data: bytes, mode: int | None = None) -> None:
    """Write a file in one step: readers see the old one or the new one.

    Its permissions are the usual ones, or `mode`, which it has from the first byte on.
    """
    descriptor, name = tempfile.mkstemp(prefix=PART, dir=target.parent)
    os.close(descriptor)
    part = Path(name)
    try:
        part.chmod(0o666 & ~umask() if mode is None else mode)
        write_synced(part, data)
        part.replace(target)
        sync(target.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def draft_file(target: Path) -> Iterator[TextIO]:
    """Lend a text file that takes the target's place in the end, unless an error comes first.

    For what is too long to hold in memory; names of files that are not UTF-8 keep their bytes.
    """
    descriptor, name = tempfile.mkstemp(prefix=PART, dir=target.parent)
    part = Path(name)
    try:
        with open(descriptor, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o666 & ~umask())
        part.replace(target)
        sync(target.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def draft_folder(parent: Path) -> Iterator[Path]:
    """Lend a folder that is gone afterwards, unless it was renamed."""
    draft = Path(tempfile.mkdtemp(prefix=PART, dir=parent))
    try:
        draft.chmod(0o777 & ~umask())
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def append_line(target: Path, line: bytes) -> None:
    """Add a line and wait until it is on the disk; a line that does not fit leaves no piece."""
    with target.open("ab") as file:
        start = file.tell()
        try:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.ftruncate(file.fileno(), start)
            raise


def remove_parts(folder: Path) -> None:
    """Clear away what a killed process had not finished writing."""
    for path in folder.glob(f"{PART}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, last a power cut."""
    with suppress(PermissionError):  # Windows cannot open folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def readable(path: str | Path) -> str:
    """A path for messages: bytes that are not UTF-8 as `\\xe9`, which any encoding can show."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_folder(folder: Path, known: Iterable[str], write: Callable[[Path], None]) -> None:
    """Fill a new folder with `write` and put it in the place of `folder` in one step.

    A reader finds the old folder or the new one. Only a folder that holds nothing but files
    called as in `known` is replaced; anything else is the user's and raises `UsageError`.
    """
    folder = folder.absolute()
    strangers = sorted(set(os.listdir(folder)) - set(known)) if folder.exists() else []
    if strangers:
        raise UsageError(
            f"{folder} holds other files ({strangers[0]}); it is replaced as a whole, "
            f"so name a folder that is new, empty or an earlier adapter"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, aside = (folder.with_name(f".{folder.name}.{end}") for end in ("new", "old"))
    _tidy(folder, fresh, aside)
    try:
        fresh.mkdir()
        write(fresh)
        for path in fresh.iterdir():
            # Some writers make files that only their owner reads.
            path.chmod(0o666 & ~umask())
            sync(path)
        sync(fresh)
        if not folder.exists():
            fresh.rename(folder)
        elif not _exchange(fresh, folder):
            # No exchange on this system: for an instant the old folder stands aside.
            folder.rename(aside)
            fresh.rename(folder)
        sync(folder.parent)
    finally:
        _tidy(folder, fresh, aside)


def _tidy(folder: Path, fresh: Path, aside: Path) -> None:
    """Remove what this writer or a killed one left, but put an old folder back first."""
    if aside.exists() and not folder.exists():
        aside.rename(folder)
    for leftover in (fresh, aside):
        shutil.rmtree(leftover, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of renameat2(2)
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0
