"""The audit command: calls one function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedclip.cli.options import AsJson, only, sorted_out
from fedclip.errors import UsageError


def audit(
    arguments: Annotated[
        list[str], typer.Argument(metavar="CONFIG|RUN [KEY=VALUE]...", hidden=True)
    ],
    canaries: Annotated[
        int | None,
        typer.Option(max=1_000_000, help="Planted examples, half of them in (400)."),
    ] = None,
    direction: Annotated[
        bool,
        typer.Option("--direction", help="Plant directions: is the noise what it should be?"),
    ] = False,
    membership: Annotated[
        bool,
        typer.Option("--membership", help="Attack as the coordinator, by each client's updates."),
    ] = False,
    trainings: Annotated[
        int, typer.Option(min=1, max=1000, help="Trainings, whose guesses count together.")
    ] = 1,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the scores, as .png or .svg.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Attack a configuration, or that of a run: what does training betray?

    Trains with planted examples of wrong labels, guesses which of them were trained on, and shows
    how often that is right beside the epsilon that is promised.
    """
    files, changes = sorted_out(arguments)
    if direction and membership:
        raise UsageError("--direction and --membership are two audits; take one at a time")
    if membership and canaries is not None:
        raise UsageError("--membership plants nothing, so leave --canaries out")
    from fedclip.cli.console import show
    from fedclip.experiment.audit.command import attack
    from fedclip.reports.progress import make_progress

    kind: Literal["direction", "membership", "example"]
    kind = "direction" if direction else "membership" if membership else "example"
    config = Path(only(files, "audit"))
    count = 400 if canaries is None else canaries
    found = attack(config, changes, kind, count, trainings, picture, make_progress())
    show(found, as_json)
