"""Folders that are written whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

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
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        # mkdtemp's 0700 would stay on the finished folder; other folders follow the umask.
        umask = os.umask(0)
        os.umask(umask)
        fresh.chmod(0o777 & ~umask)
        write(fresh)
        for path in [*fresh.iterdir(), fresh]:
            _sync(path)
        _replace(fresh, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _replace(fresh: Path, folder: Path) -> None:
    """Move `fresh` to `folder`; an older folder ends up under the name of `fresh`."""
    if not folder.exists():
        fresh.rename(folder)
    elif not _exchange(fresh, folder):
        # No exchange on this system: for an instant the old folder stands aside.
        aside = fresh.with_name(fresh.name + "-old")
        folder.rename(aside)
        fresh.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)


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


def _sync(path: Path) -> None:
    """Ask the system to put a file or folder on the disk now."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
