"""Lock files: one process at a time on a folder, and whether there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedclip.errors import UsageError

try:
    import fcntl
except ImportError:  # not on Windows: there, two processes on one folder go unnoticed
    fcntl = None  # type: ignore[assignment]


@contextmanager
def exclusive(path: Path, taken: str) -> Iterator[None]:
    """Hold a lock file; `UsageError` with the text `taken` where another process holds it.

    A killed holder is no obstacle. File systems without locks keep nobody out.
    """
    with path.open("ab") as handle:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(taken) from None
            except OSError:
                pass
        yield


def is_held(path: Path) -> bool:
    """Whether a process holds a lock file."""
    try:
        with path.open("rb") as handle:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
