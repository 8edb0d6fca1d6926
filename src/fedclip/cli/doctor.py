"""`fedclip doctor`: what a run will take, before it is begun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedclip.cli.options import AsJson, Overrides, only, sorted_out
from fedclip.errors import UsageError


def doctor(
    arguments: Annotated[list[str], typer.Argument(metavar="CONFIG [KEY=VALUE]...", hidden=True)],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Predict memory, time, traffic and disk of a run.

    CONFIG is a YAML file, as for `fedclip run`. Model and data are loaded and a few steps are
    measured; nothing is written. The exit code is 2 where the run does not fit this machine.
    """
    files, changes = sorted_out(arguments, overrides)
    file = only(files, "doctor")
    from fedclip.config.loading import load_config

    config = load_config(Path(file), changes)
    from fedclip.cli.endings import say_loading

    say_loading(f"looking at {file}")
    from fedclip.adapters.doctor import examine
    from fedclip.reports.progress import make_progress

    with make_progress() as listener:
        found = examine(config, listener, Path("runs"))
    _show(found, as_json)
    if found["problems"]:
        raise UsageError("\n".join(found["problems"]))


def _show(found: dict[str, Any], as_json: bool) -> None:
    from rich.console import Console

    from fedclip.cli.console import show

    if as_json:
        show(found, as_json=True)
        return
    from fedclip.reports.progress import duration
    from fedclip.reports.tables import partition_table

    for facts in found.pop("data"):
        table = partition_table(facts.pop("class_names"), facts.pop("training"))
        show(facts, as_json=False)
        Console(highlight=False).print(table)
    words = {
        key.removesuffix("_seconds").replace("_", " "): duration(value)
        for key, value in found.items()
        if key.endswith("_seconds")
    }
    rest = {k: v for k, v in found.items() if not k.endswith("_seconds") and k != "problems"}
    show(rest | {"time": words}, as_json=False)
