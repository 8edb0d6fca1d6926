"""Folders of models and adapters, written whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from fedclip import files
from fedclip.errors import UsageError


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
            path.chmod(0o666 & ~files.umask())
            files.sync(path)
        files.sync(fresh)
        if not folder.exists():
            fresh.rename(folder)
        elif not _exchange(fresh, folder):
            # No exchange on this system: for an instant the old folder stands aside.
            folder.rename(aside)
            fresh.rename(folder)
        files.sync(folder.parent)
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
