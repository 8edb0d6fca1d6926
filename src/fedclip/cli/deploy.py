"""The commands of federations over several machines: each calls one function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedclip.cli.options import only, sorted_out
from fedclip.errors import UsageError, install

Arguments = Annotated[list[str], typer.Argument(metavar="CONFIG [KEY=VALUE]...", hidden=True)]


def coordinate(
    arguments: Arguments,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The run folder [default: runs/<config>]."),
    ] = None,
) -> None:
    """Train an adapter over sites on other machines.

    CONFIG is a YAML file with a deploy section; KEY=VALUE changes a key of it. The same command
    goes on with a run that was stopped or killed.
    """
    from fedclip.cli.console import echo, say

    files, changes = sorted_out(arguments)
    file = Path(only(files, "coordinate"))
    _needs_flower()
    from fedclip.config.loading import load_config
    from fedclip.deploy.coordinator.coordinate import coordinate as carry_out
    from fedclip.reports.closing import closing_lines

    folder = output or Path("runs") / file.stem
    try:
        run = carry_out(load_config(file, changes), folder, say)
    except KeyboardInterrupt:
        say(f"stopped; the same command goes on from the last finished round in {folder}")
        raise typer.Exit(130) from None
    echo("\n".join([*closing_lines(run.summary), f"run folder: {run.folder}"]))


def site(
    config: Annotated[Path, typer.Option("--config", help="The site's configuration file.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[approve] [KEY=VALUE]...", hidden=True)
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check everything, and do not join.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="With approve: do not ask before approving.")
    ] = False,
) -> None:
    """Take part in a federation with a folder of images.

    The images stay here. It goes on until it is stopped, and joins again after whatever happens.
    `fedclip site approve --config FILE` shows what the last run asked for, and approves it.
    """
    from fedclip.cli.console import say
    from fedclip.deploy.site.config import load_site

    approving = "approve" in (changes := changes or [])
    loaded = load_site(config, [text for text in changes if text != "approve"])
    if approving:
        from fedclip.cli.console import echo, show
        from fedclip.deploy.site.approve import approve

        agree = (lambda _: True) if yes else typer.confirm
        echo(approve(loaded, lambda terms: show(terms, False), agree))
        return
    if yes:
        raise UsageError("--yes is for `fedclip site approve`")
    if check:
        from fedclip.cli.console import show
        from fedclip.deploy.site.policy import preflight

        show(preflight(loaded, every_image=True), False)
        return
    _needs_flower()
    from fedclip.deploy.site.run import run_site

    try:
        run_site(loaded, say)
    except KeyboardInterrupt:
        say(f"site {loaded.name} has stopped")


def _needs_flower() -> None:
    """Refuse to go on without Flower."""
    from importlib.util import find_spec

    if find_spec("flwr") is None:
        raise UsageError(f"this needs Flower; {install('flower')}")
