"""The audit command: calls one function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedclip.cli.options import AsJson, only, sorted_out


def audit(
    arguments: Annotated[list[str], typer.Argument(metavar="CONFIG [KEY=VALUE]...", hidden=True)],
    canaries: Annotated[
        int, typer.Option("--canaries", max=1_000_000, help="Planted examples, half of them in.")
    ] = 400,
    as_json: AsJson = False,
) -> None:
    """Attack a configuration: what does training betray?

    Trains once with planted examples of wrong labels, guesses which of them were trained on, and
    shows how often that is right beside the epsilon that is promised.
    """
    files, changes = sorted_out(arguments)
    from fedclip.cli.console import show
    from fedclip.config.loading import load_config
    from fedclip.experiment.audit import audit as attack
    from fedclip.reports.progress import make_progress

    config = load_config(Path(only(files, "audit")), changes)
    show(attack(config, canaries, listener=make_progress()), as_json)
