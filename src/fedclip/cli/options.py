"""Arguments and options that several commands have, and files told from `key=value` texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedclip.errors import UsageError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
# Arguments are explained in the texts of commands: the list that typer 0.20 makes of them loses its
# words with newer versions of click.
RunPath = Annotated[Path, typer.Argument(metavar="RUN", hidden=True)]
Best = Annotated[
    bool, typer.Option("--best", help="Take the best round by validation, not the last one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key; the same as a bare key=value."),
]


def sorted_out(
    arguments: list[str] | None, overrides: list[str] | None = None
) -> tuple[list[str], list[str]]:
    """Files and `key=value` texts apart; a file whose name has a `=` in it is a file."""
    arguments = arguments or []
    files = [text for text in arguments if "=" not in text or Path(text).exists()]
    return files, [text for text in arguments if text not in files] + (overrides or [])


def only(files: list[str], command: str) -> str:
    """The one file that a command takes."""
    if len(files) == 1:
        return files[0]
    if files:
        raise UsageError(
            f"fedclip {command} takes one CONFIG, got {', '.join(files)}; "
            "keys are changed by key=value"
        )
    raise UsageError(f"fedclip {command} needs a CONFIG file, such as configs/quickstart.yaml")
