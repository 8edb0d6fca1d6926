"""The subcommands that make something new of trained adapters: `export` and `merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedclip.catalog import MERGE_METHODS
from fedclip.cli.options import AsJson, Best, RunPath
from fedclip.errors import UsageError


def export(
    folder: RunPath,
    to: Annotated[
        str,
        typer.Option(
            "--to", help="peft (the adapter), merged (a transformers CLIPModel) or onnx (towers)."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The new folder [default: RUN-FORM].")
    ] = None,
    best: Best = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's model for other programs.

    RUN is a folder that `fedclip run` made, or an adapter folder.
    """
    from fedclip import export as write
    from fedclip.cli.console import show

    show(write(folder, to, output, best=best), as_json)


def merge(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", hidden=True)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new adapter folder.")],
    method: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(MERGE_METHODS)} [default: svd].",
            show_default=False,
        ),
    ] = "svd",
    weights: Annotated[
        str | None,
        typer.Option(metavar='"W,W"', help="A weight for each adapter, comma-separated."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the result [default: the largest given].")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of entries that ties, dare and knots keep.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of dare and of the search [default: 0].", show_default=False)
    ] = 0,
    search: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN", help="Search weights on this run's validation; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Combine adapters into one.

    ADAPTER is a folder that `fedclip run` made, or an adapter folder; all have the same base and
    layers.
    """
    from fedclip.cli.runs import merge_adapters

    numbers = None if weights is None else _numbers(weights)
    merge_adapters(
        adapters,
        output,
        search or [],
        as_json,
        method=method,
        weights=numbers,
        rank=rank,
        density=density,
        seed=seed,
    )


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(
            f'--weights must be numbers separated by commas, such as "0.5,0.5", got "{text}"'
        ) from None
