"""SIGTERM and SIGHUP end a command as Ctrl-C does: what was reached is kept."""

from __future__ import annotations

import signal
from typing import Any

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
_received: list[int] = []


def end_like_interrupt() -> None:
    """From here on, SIGTERM and SIGHUP raise KeyboardInterrupt.

    A signal that the caller has set to be ignored, as `nohup` does with SIGHUP, stays ignored.
    """
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # SIGHUP is not on Windows
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def exit_code(code: int) -> int:
    """128 and the signal's number where a signal, not Ctrl-C, has ended the command."""
    return 128 + _received[0] if code == INTERRUPTED and _received else code


def _interrupt(number: int, frame: Any) -> None:
    _received.append(number)
    raise KeyboardInterrupt
