"""The commands of a beginning: `init`, `configs` and `schema`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedclip.cli.inference import label_list
from fedclip.cli.options import AsJson
from fedclip.errors import UsageError

if TYPE_CHECKING:
    from fedclip.config.starter import Wishes

_MOST_ROUNDS = 50


def init(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The file [default: fedclip.yaml]."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FOLDER", help="Your images [default: built-in digits]."),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option("--classes", metavar='"A,B,C"', help="Class names [default: the folders']."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="The CLIP [default: tiny].")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0.1, max=100_000, help="Time that there is for a run."),
    ] = None,
) -> None:
    """Write a commented configuration.

    Without options, on a terminal, it asks. With --minutes a few steps are measured, and the
    rounds are as many as that time allows.
    """
    output = output or Path("fedclip.yaml")
    if output.exists():
        raise UsageError(f"{output} exists; name another file by --output")
    asked = (data, classes, model, minutes) == (None,) * 4 and sys.stdin.isatty()
    if asked:
        data, classes, model, minutes = _questions()
    from fedclip.cli.console import echo, say

    text, wishes, found = _written(data, label_list(classes), model, minutes)
    from fedclip import files

    try:
        files.replace_file(output, text.encode())
    except OSError as error:
        raise UsageError(f"--output {output}: {error.strerror or error}") from None
    echo(str(output))
    for line in found:
        say(line)
    say(
        f"{wishes.rounds} rounds; next: fedclip validate {output} --data, "
        f"then fedclip doctor {output} and fedclip run {output}"
    )


def _questions() -> tuple[Path | None, str | None, str | None, float | None]:
    """What init needs, asked on a terminal; an empty answer is the default."""
    folder = typer.prompt("Folder of your images (empty: built-in digits)", "", show_default=False)
    names = None
    if folder:
        names = typer.prompt("Class names, comma-separated (empty: the folders')", "",
                             show_default=False)  # fmt: skip
    model = typer.prompt("Model: tiny, a hub id or a folder", "tiny")
    minutes = typer.prompt("Minutes for a run (empty: 10 rounds)", "", show_default=False)
    try:
        return Path(folder) if folder else None, names or None, model, float(minutes or 0) or None
    except ValueError:
        raise UsageError(f"minutes must be a number, got {minutes!r}") from None


def _written(
    data: Path | None, classes: list[str] | None, model: str | None, minutes: float | None
) -> tuple[str, Wishes, list[str]]:
    """The text, with rounds for the time that there is, and what was found in the folder."""
    from dataclasses import replace

    from fedclip.config.starter import Wishes, starter

    if data is not None and not data.is_dir():
        raise UsageError(f"--data {data} is not a folder; name one of images, by class or by site")
    if classes and data is None:
        raise UsageError("--classes are names of the folders in --data; give that too")
    wishes = Wishes(
        folder=None if data is None else str(data),
        by_site=data is not None and _has_sites(data),
        classes=classes or (),
        model=model or "tiny",
    )
    found = [f"the built-in digits, {_divided(wishes.clients)}"]
    if data is not None:
        found, by_site = _looked_at(data, classes, wishes)
        wishes = replace(wishes, by_site=by_site)
    if minutes is not None:
        wishes = replace(wishes, rounds=_rounds_in(starter(wishes), 60 * minutes))
    return starter(wishes), wishes, found


def _looked_at(data: Path, classes: list[str] | None, wishes: Wishes) -> tuple[list[str], bool]:
    """What the folder holds, in words, and whether by sites; what a run would refuse is warned of.

    The file is written all the same: it is where such faults are mended.
    """
    from fedclip.cli.console import warn
    from fedclip.data.datasets import load_source
    from fedclip.data.source import some

    try:
        source = load_source("imagefolder", path=str(data), class_names=classes)
    except UsageError as error:
        warn(str(error))
        return [], wishes.by_site
    sites = source.site_names
    held = f"{len(source):,} images of {len(source.class_names)} classes"
    held = f"{data}: {held} ({some(source.class_names, 6)})"
    if not sites:
        return [f"{held}, {_divided(wishes.clients)}"], False
    return [f"{held} at {len(sites)} sites ({some(sites, 6)}), each a client"], True


def _divided(clients: int) -> str:
    return (
        f"to be divided over {clients} invented clients; federation.strategy=centralised is plain "
        "training on all of them together"
    )


def _has_sites(data: Path) -> bool:
    """Whether folders lie two deep, as <site>/<class>/, below a `train` folder if there is one."""
    root = data / "train" if (data / "train").is_dir() else data
    return any(inner.is_dir() for folder in root.iterdir() if folder.is_dir()
               for inner in folder.iterdir())  # fmt: skip


def _rounds_in(text: str, seconds: float) -> int:
    """As many rounds as the time allows, by a few measured steps; at least one."""
    from fedclip.adapters.doctor import examine
    from fedclip.config.loading import config_from_dict
    from fedclip.config.strict_yaml import parse_yaml
    from fedclip.reports.progress import make_progress

    with make_progress() as listener:
        found = examine(config_from_dict(parse_yaml(text), "fedclip init"), listener)
    each = found["round_seconds"] + found["evaluation_seconds"]
    left = seconds - found["loading_seconds"] - found["evaluation_seconds"]
    return min(_MOST_ROUNDS, max(1, int(left / each)))


def configs(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", hidden=True)] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to [default: NAME.yaml]."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the ready configurations, or copy one.

    NAME is one of the list, such as quickstart, or bench/ranks for a grid of `fedclip bench`.
    """
    from fedclip import files
    from fedclip.cli.console import echo, show_rows
    from fedclip.config.ready import ready, ready_named

    if name is None:
        if output is not None:
            raise UsageError("--output is where to copy a configuration; name one of the list")
        show_rows([{"name": one.name, "what": one.about} for one in ready()], as_json)
        return
    found = ready_named(name)
    target = output or Path(found.path.name)
    if target.exists():
        raise UsageError(f"{target} exists; name another file by --output")
    try:
        files.replace_file(target, found.path.read_bytes())
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror or error}") from None
    echo(str(target))


def schema(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write it here instead of printing."),
    ] = None,
) -> None:
    """Print the JSON schema of configurations, for editors.

    An editor that knows YAML then completes and explains keys.
    """
    from fedclip import files
    from fedclip.config import Config

    address = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    text = json.dumps(address | Config.model_json_schema(), indent=2, ensure_ascii=False)
    if output is None:
        typer.echo(text)
        return
    try:
        files.replace_file(output, text.encode())
    except OSError as error:
        raise UsageError(f"--output {output}: {error.strerror or error}") from None
