"""The subcommands of `fedclip log`: what happened in a federation, provably."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedclip.cli.options import AsJson

app = typer.Typer(
    name="log",
    help="Check the signed logs of a federation over several machines.",
    no_args_is_help=True,
    rich_markup_mode=None,
    suggest_commands=False,
)


@app.callback()
def _root() -> None:
    pass


@app.command()
def verify(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", hidden=True)],
    keys: Annotated[
        Path | None,
        typer.Option("--keys", help="The coordinator's folder of keys, to compare the logs' with."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that logs are whole, and fit each other.

    FOLDER is a run of `fedclip coordinate` or a site's state. A log alone can be checked for
    changes only; whether its end was cut off, the other sides' logs tell.
    """
    from fedclip.cli.console import show_rows
    from fedclip.deploy.log.verify import verify_folders

    show_rows(verify_folders(folders, keys), as_json)
