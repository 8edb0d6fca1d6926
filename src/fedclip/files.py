"""Files and folders that appear whole or not at all; JSON that is read and not believed."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from fedclip.errors import UsageError

PART = ".part-"
"""Files and folders that are still being written begin so; a kill may leave some behind."""

JSON_BYTES = 1 << 28
JSON_DEPTH = 64


def replace_file(
    target: Path, data: bytes, mode: int | None = None, previous: Path | None = None
) -> None:
    """Write a file in one step: readers see the old one or the new one.

    Its permissions are the usual ones, or `mode`, which it has from the first byte on. The old
    file is kept under the name `previous`; a kill in that instant leaves it under this name only.
    """
    descriptor, name = tempfile.mkstemp(prefix=PART, dir=target.parent)
    os.close(descriptor)
    part = Path(name)
    try:
        part.chmod(0o666 & ~umask() if mode is None else mode)
        write_synced(part, data)
        if previous is not None and target.exists():
            target.replace(previous)
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


def parse_json(data: bytes | str, where: str) -> Any:
    """Parse JSON as RFC 8259 has it, of bounded size and depth.

    Everything that the library raises on damaged or hostile text becomes a `UsageError` that
    begins with `where`: other encodings, deep nesting, endless numbers, NaN, half a surrogate pair.
    """
    try:
        if len(data) > JSON_BYTES:
            raise ValueError(f"it has more than {JSON_BYTES} bytes")
        text = data if isinstance(data, str) else data.decode()
        value = json.loads(text, parse_constant=_no_number)
        _check_depth(value)
        if "\\u" in text:  # the only way for half of a pair to come in
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UsageError(f"{where} is damaged: {reason}") from None
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; `UsageError` names the file and what is wrong."""
    try:
        with path.open("rb") as file:
            data = file.read(JSON_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    value = parse_json(data, str(path))
    if not isinstance(value, dict):
        raise UsageError(f"{path} is damaged: expected a JSON object, got {type(value).__name__}")
    return value


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON")


def _check_depth(value: object) -> None:
    """Raise where lists and mappings lie deeper in each other than any file of ours."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > JSON_DEPTH:
            raise RecursionError
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]


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
