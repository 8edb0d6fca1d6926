"""What the command line says and draws: results, warnings, errors, and the exit code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedclip.errors import UsageError, harmless
from fedclip.reports.text import json_text, message, plain


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


def show_info(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print what a configuration or a run is on one screen; JSON has the whole summary."""
    summary = facts.get("summary")
    if as_json or summary is None:
        show(facts, as_json)
        return
    from fedclip.reports.closing import closing_lines

    told = {key: summary[key] for key in ("data", "strategy", "engine", "clients", "seconds")}
    show({k: v for k, v in facts.items() if k not in ("summary", *told)} | told, as_json=False)
    echo("\n".join(["", *closing_lines(summary)]))


def show_evaluation(figures: Mapping[str, Any], as_json: bool) -> None:
    """Print an evaluation, with its table of classes; one in detail has one of sites below."""
    if as_json:
        show(figures, as_json)
        return
    from fedclip.reports.closing import evaluation_facts, three_digits
    from fedclip.reports.share import few

    detail, apart = three_digits(figures.get("detail")), ("detail", "classes", "adapters")
    both = {name: detail[name] for name in ("base", "trained")} if detail else {}
    told = evaluation_facts({k: v for k, v in figures.items() if k not in apart})
    show(told | both, as_json=False)
    if little := few(figures.get("test_examples")):
        echo(little)
    tables = detail or {"classes": three_digits(figures.get("classes", []))}
    for name in ("classes", "sites"):
        if tables.get(name):
            click.echo()
            show_rows(tables[name], as_json=False)
    if "adapters" in figures:
        click.echo()
        show_matrix(figures["adapters"])


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
            measured = "bytes" in str(name) and value is not None
            label = " ".join(word for word in words.split(" ") if word != "bytes")
            yield label if measured else words, _megabytes(value) if measured else value


def _megabytes(count: float) -> str:
    """Bytes in megabytes, with three digits behind the point of small ones and none of large."""
    size = count / 1e6
    return f"{size:,.{3 if size < 100 else 1 if size < 1000 else 0}f} MB"


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
