"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

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


def umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
