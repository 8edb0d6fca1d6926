"""Runs as commands: begun or gone on with, their progress, and what they say at their end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from fedclip.cli.console import echo, say, show, show_matrix, show_rows
from fedclip.cli.endings import Stopped, is_first, say_loading

if TYPE_CHECKING:
    from fedclip.config import Config
    from fedclip.experiment.run import Run
    from fedclip.reports.listener import Listener


def new_run(config: Config, stem: str, output: Path | None) -> None:
    """Run a configuration into a new folder, with progress on standard error."""
    say_loading(f"run of {stem}")
    from fedclip.experiment.folder import next_folder

    folder = output or next_folder(stem)
    try:
        from fedclip import run

        _conclude(run(config, output=folder, listener=_listeners()))
    except KeyboardInterrupt:
        raise Stopped(folder) from None


def resume_run(folder: Path) -> None:
    """Go on with a run; one that is finished stays as it is."""
    from fedclip.experiment.folder import RunFolder

    if RunFolder.open(folder).has_rounds_left():
        say_loading(f"going on with {folder}")
    elif is_first():
        say(f"{folder} is finished; there is nothing left to do")
    from fedclip import resume

    try:
        _conclude(resume(folder, listener=_listeners()))
    except KeyboardInterrupt:
        raise Stopped(folder) from None


def _listeners() -> list[Listener]:
    """Who observes a run of the command line."""
    from fedclip.reports.progress import make_progress

    return [make_progress()]


def _conclude(run: Run) -> None:
    if not is_first():
        return
    from fedclip.experiment.folder import REPORT
    from fedclip.reports.closing import closing_lines
    from fedclip.reports.tables import retrieval_rows

    summary = run.summary
    if rows := retrieval_rows(summary):
        show_rows(rows, as_json=False)
    echo("\n".join([*closing_lines(summary), f"run folder: {run.folder}"]))
    if "adapters" in summary:
        click.echo()
        show_matrix(summary["adapters"])
    folder = quote(str(run.folder))
    measured = rows or "adapters" in summary  # captions, or tasks: predict needs to know of which
    then = f"fedclip evaluate {folder}" if measured else f"fedclip predict {folder} IMAGE..."
    say(f"report: {run.folder / REPORT}; next: {then}")


def merge_adapters(
    adapters: Sequence[Path], output: Path, search: Sequence[Path], as_json: bool, **how: Any
) -> None:
    """Merge adapters, and say what came of it."""
    from fedclip import merge
    from fedclip.reports.progress import make_progress

    facts = merge(adapters, output, search=search, listener=make_progress(), **how)
    rows = [] if as_json else facts.pop("search", [])
    show(facts, as_json)
    if rows:
        show_rows(rows, as_json)
