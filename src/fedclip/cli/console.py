"""What the command line says and draws: results, warnings, errors, and the exit code."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedclip.device import torchrun_number
from fedclip.errors import FedclipError, FedclipWarning, ProcessLost, UsageError, harmless
from fedclip.reports.text import json_text, message, plain

if TYPE_CHECKING:
    from fedclip.config import Config
    from fedclip.experiment.run import Run


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


def new_run(config: Config, stem: str, output: Path | None) -> None:
    """Run a configuration into a new folder, with progress on standard error."""
    from fedclip.experiment.folder import next_folder

    folder = output or next_folder(stem)
    try:
        from fedclip.experiment import run as experiment
        from fedclip.reports.progress import make_progress

        _conclude(experiment.run(config, output=folder, listener=make_progress()))
    except KeyboardInterrupt:
        raise Stopped(folder) from None


def resume_run(folder: Path) -> None:
    """Go on with a run; one that is finished stays as it is."""
    from fedclip.experiment import run as experiment
    from fedclip.experiment.folder import RunFolder
    from fedclip.reports.progress import make_progress

    if not RunFolder.open(folder).has_rounds_left() and _is_first():
        say(f"{folder} is finished; there is nothing left to do")
    try:
        _conclude(experiment.resume(folder, listener=make_progress()))
    except KeyboardInterrupt:
        raise Stopped(folder) from None


def _conclude(run: Run) -> None:
    if not _is_first():
        return
    from fedclip.reports.tables import retrieval_rows

    summary = run.summary
    if rows := retrieval_rows(summary):
        show_rows(rows, as_json=False)
    for name in summary.get("metrics", ()):
        echo(f"{name} {_figure(summary[name])} ({_figure(summary[f'initial_{name}'])} before)")
    early = f", ended early: {summary['stopped_by']}" if summary.get("stopped_by") else ""
    echo(
        f"accuracy {summary['accuracy']:.3f} (zero-shot {summary['zero_shot_accuracy']:.3f}) "
        f"after {summary['rounds']} rounds{early}\nrun folder: {run.folder}"
    )
    if "adapters" in summary:
        click.echo()
        show_matrix(summary["adapters"])


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def merge_adapters(
    adapters: Sequence[Path], output: Path, search: Sequence[Path], as_json: bool, **how: Any
) -> None:
    """Merge adapters, and say what came of it."""
    from fedclip.adapters.merge import merge
    from fedclip.reports.progress import make_progress

    facts = merge(adapters, output, search=search, listener=make_progress(), **how)
    rows = [] if as_json else facts.pop("search", [])
    show(facts, as_json)
    if rows:
        show_rows(rows, as_json)


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print facts as a table of two columns, or as JSON."""
    if as_json:
        click.echo(json_text(facts))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _flat(facts):
        table.add_row(_plain_text(name), _plain_text(value))
    Console(highlight=False).print(table)


def show_rows(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print like-shaped facts as a table with a heading, or as JSON."""
    if as_json:
        click.echo(json_text(rows))
        return
    columns = [
        name for name, value in (rows[0] if rows else {}).items() if not _nested(value)
    ]  # what is nested is for --json
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(plain(name.replace("_", " ")), overflow="fold")
    for row in rows:
        table.add_row(*(_plain_text(row.get(name)) for name in columns))
    Console(highlight=False).print(table)


def show_evaluation(figures: Mapping[str, Any], as_json: bool) -> None:
    """Print an evaluation; one in detail has a table of classes and one of sites below."""
    detail = figures.get("detail")
    if "adapters" in figures and not as_json:
        show({key: value for key, value in figures.items() if key != "adapters"}, as_json=False)
        click.echo()
        show_matrix(figures["adapters"])
        return
    if as_json or detail is None:
        show(figures, as_json)
        return
    both = {name: detail[name] for name in ("base", "trained")}
    show({key: value for key, value in figures.items() if key != "detail"} | both, as_json=False)
    for name in ("classes", "sites"):
        click.echo()
        show_rows(detail[name], as_json=False)


def show_matrix(adapters: Mapping[str, Mapping[str, float | None]]) -> None:
    """Print the accuracy of every adapter (rows) on every task (columns)."""
    rows = []
    for name, row in adapters.items():
        cells = {task: None if value is None else f"{value:.3f}" for task, value in row.items()}
        rows.append({"adapter": name, **cells})
    show_rows(rows, as_json=False)


def write_plots(detail: Mapping[str, Any], folder: Path) -> None:
    """Write the plots of an evaluation in detail into a folder, which is made if need be."""
    from fedclip import files
    from fedclip.reports.breakdown_plots import plots

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in plots(detail).items():
            files.replace_file(folder / name, data)
    except OSError as error:
        raise UsageError(f"--plots {folder}: {error.strerror or error}") from None


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        words = prefix + str(name).replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{words}: ")
        else:
            # Bytes are for programs; people read megabytes.
            measured = "bytes" in str(name)
            label = " ".join(word for word in words.split(" ") if word != "bytes")
            yield label if measured else words, f"{value / 1e6:,.3f} MB" if measured else value


def _nested(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _plain_text(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        words = f"{value:,}"
    elif isinstance(value, float):
        words = f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    elif isinstance(value, list | tuple):
        words = ", ".join(map(str, value))
    else:
        words = "-" if value is None else str(value)
    return plain(words)


def exit_code_of(command: Callable[[], Any]) -> int:
    """Call a command, say what went wrong, and give the process's exit code."""
    warnings.simplefilter("always", FedclipWarning)
    usual = warnings.showwarning

    def show_warning(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, FedclipWarning):
            if _is_first():
                warn(str(message))
        else:
            usual(message, category, *place, **more)

    warnings.showwarning = show_warning
    try:
        code = int(command() or 0)
        if (
            code == 130 and _is_first()
        ):  # typer turns Ctrl-C outside a run into this code, without a word
            say("stopped; nothing was written")
        return code
    except BaseException as error:
        return _explain(error)
    finally:
        warnings.showwarning = usual


def _explain(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, _COMMON) and not _is_first(usage=isinstance(error, UsageError)):
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


def _is_first(usage: bool = False) -> bool:
    """Whether this is the first process of a run, or with `usage` the first on its machine."""
    return torchrun_number("LOCAL_RANK" if usage else "RANK", 0) == 0


def _how_to_go_on(folder: Path) -> str:
    from fedclip.experiment.folder import RunFolder

    if RunFolder(folder).is_run():
        return f"stopped; the last finished round is kept. Go on by: fedclip run --resume {folder}"
    return "stopped before the run began; nothing was written"


def echo(text: str) -> None:
    """Print a result on standard output; names in it are shown, and steer no terminal."""
    click.echo(harmless(text))


def warn(text: str) -> None:
    """Say on standard error what does not stop a command."""
    say(text, "warning: ", "yellow")


def say(text: str, label: str = "", colour: str = "") -> None:
    """Print on standard error, with a coloured label in front."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble((label, f"bold {colour}".strip()), message(text)))
