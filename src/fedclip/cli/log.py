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
    from fedclip.cli.console import echo, show_rows
    from fedclip.deploy.log.verify import verify_folders

    rows = verify_folders(folders, keys)
    if as_json:
        show_rows(rows, as_json)
        return
    for row in rows:
        echo("{log}: {lines} lines, {confirmed}; {note}; signed by {keys}".format(**row))


def verify_adapter(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", hidden=True)],
    key: Annotated[
        list[Path] | None,
        typer.Option(
            "--key",
            metavar="FILE",
            help="A public key or certificate (such as ca.crt) that is trusted; repeatable.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the signed statement of a federation's adapter.

    ADAPTER is the adapter of a run of `fedclip coordinate`, or of a site. Shows what it was made
    of: base, sites, rounds, epsilon, code. Without --key nobody vouches for the signer.
    """
    from fedclip.adapters.load import adapter_folder
    from fedclip.cli.console import show, warn
    from fedclip.deploy.log.adapter_statement import verify_adapter as verified

    show(verified(adapter_folder(adapter), key or ()), as_json)
    if not key:
        warn("the statement holds, but whose it is was not compared; name a trusted key by --key")


def status(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", hidden=True)], as_json: AsJson = False
) -> None:
    """Show where a federation stands.

    FOLDER is a run of `fedclip coordinate` or a site's state.
    """
    from fedclip.cli.console import echo, show, show_rows
    from fedclip.deploy.log.status import status as facts_of

    facts = facts_of(folder)
    rows = None if as_json else facts.pop("sites", None)
    show(facts, as_json)
    if rows:
        echo("")
        show_rows(rows, as_json=False)
