"""How a command ends: what went wrong, said once by all processes of a run, and the exit code."""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fedclip.cli.console import say, warn
from fedclip.device import torchrun_number
from fedclip.errors import FedclipError, FedclipWarning, ProcessLost, UsageError


class Stopped(Exception):
    """Ctrl-C during a run, with the folder from which it can go on."""

    def __init__(self, folder: Path) -> None:
        """Name the folder."""
        self.folder = folder


# Of several processes on one run, all meet with these, and the first one says so.
_COMMON = (
    UsageError,
    ProcessLost,
    Stopped,
    KeyboardInterrupt,
    click.Abort,
    click.ClickException,
)


def exit_code_of(command: Callable[[], Any]) -> int:
    """Call a command, say what went wrong, and give the process's exit code."""
    warnings.simplefilter("always", FedclipWarning)
    usual = warnings.showwarning

    def show_warning(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, FedclipWarning):
            if is_first():
                warn(str(message))
        else:
            usual(message, category, *place, **more)

    warnings.showwarning = show_warning
    try:
        code = int(command() or 0)
        # typer turns Ctrl-C outside a run into this code, without a word.
        if code == 130 and is_first():
            say("stopped; nothing was written")
        return code
    except BaseException as error:
        return _explain(error)
    finally:
        warnings.showwarning = usual


def _explain(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    usage = isinstance(error, UsageError | click.ClickException)
    if isinstance(error, _COMMON) and not is_first(usage) and (not usage or _first_speaks()):
        return int(getattr(error, "exit_code", 130))
    if isinstance(error, BrokenPipeError):  # `fedclip info ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, Stopped):
        say(_how_to_go_on(error.folder))
        return 130
    if isinstance(error, KeyboardInterrupt | click.Abort):
        say("stopped")
        return 130
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if os.environ.get("FEDCLIP_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, FedclipError):
        say(str(error), "error: ", "red")
        return error.exit_code
    what = " ".join(str(error).split())[:500]
    say(
        f"{type(error).__name__}: {what} (unforeseen; FEDCLIP_DEBUG=1 shows the traceback)",
        "error: ",
        "red",
    )
    return 1


def say_loading(what: str) -> None:
    """Say at once what begins, where the libraries that it needs take seconds to load."""
    if is_first() and "torch" not in sys.modules:
        say(f"{what}: loading libraries")


def is_first(usage: bool = False) -> bool:
    """Whether this is the first process of a run, or with `usage` the first on its machine."""
    return torchrun_number("LOCAL_RANK" if usage else "RANK", 0) == 0


def _first_speaks(seconds: float = 20) -> bool:
    """Whether torchrun ends this process within this time, since the first one has failed too.

    Were this process to exit at once, torchrun could end the first one before it has said why.
    """
    try:
        time.sleep(seconds)
    except KeyboardInterrupt:
        return True
    return False


def _how_to_go_on(folder: Path) -> str:
    from fedclip.experiment.folder import RunFolder

    if RunFolder(folder).is_run():
        return f"stopped; the last finished round is kept. Go on by: fedclip run --resume {folder}"
    return "stopped before the run began; nothing was written"
