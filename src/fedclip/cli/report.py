"""The commands around a run's page: `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", hidden=True)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The page [default: RUN/report.html]."),
    ] = None,
    no_images: Annotated[
        bool, typer.Option("--no-images", help="Without images of the test set.")
    ] = False,
) -> None:
    """Write a page on a run, or on several side by side.

    RUN is a folder that `fedclip run` made, finished or not. The page is one HTML file that loads
    nothing; several runs need --output.
    """
    from fedclip.cli.console import echo
    from fedclip.experiment.report import report as write

    echo(str(write(runs, output, images=not no_images)))
