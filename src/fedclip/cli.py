"""The `fedclip` command: each subcommand calls one function.

What a command needs is imported inside it, so that `fedclip --help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedclip.errors import UsageError

if TYPE_CHECKING:
    from fedclip.config import Config

app = typer.Typer(
    name="fedclip",
    help="Federated LoRA fine-tuning of CLIP: sites exchange small adapters, never images.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    suggest_commands=False,
)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key; the same as a bare key=value."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
# Arguments are explained in the texts of commands: the list that typer 0.20 makes of them loses its
# words with newer versions of click.
RunPath = Annotated[Path, typer.Argument(metavar="RUN", hidden=True)]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fedclip {version('fedclip')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


@app.command()
def run(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG [KEY=VALUE]...", hidden=True),
    ] = None,
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The run folder [default: runs/<config>-<number>]."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="RUN", help="Go on with a run that was stopped."),
    ] = None,
) -> None:
    """Train an adapter over the federation.

    CONFIG is a YAML file; KEY=VALUE changes a key of it, such as federation.rounds=5. The result
    is a run folder: the adapter, its figures, and all that it takes to go on after a stop.
    """
    if resume is not None:
        if arguments or overrides or output:
            raise UsageError(
                "--resume takes only the run folder: a resumed run keeps its configuration "
                f"({resume}/config.yaml) and its place"
            )
        from fedclip.cli_support import resume_run

        resume_run(resume)
        return
    files, changes = _sorted_out(arguments, overrides)
    config = _load(_only(files, "run"), changes)
    from fedclip.cli_support import new_run

    new_run(config, Path(files[0]).stem, output)


@app.command()
def validate(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG... [KEY=VALUE]...", hidden=True),
    ],
    overrides: Overrides = None,
) -> None:
    """Check configurations; report every error.

    KEY=VALUE changes a key in each of them.
    """
    files, changes = _sorted_out(arguments, overrides)
    if not files:
        raise UsageError("fedclip validate needs a CONFIG file, such as configs/quickstart.yaml")
    problems = []
    for file in files:
        try:
            _load(file, changes)
            typer.echo(f"{file}: valid")
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))


@app.command()
def info(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG|RUN [KEY=VALUE]...", hidden=True),
    ],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show parameters and what travels.

    For a CONFIG (a YAML file) or a RUN (a folder that `fedclip run` made): parameters, the
    trainable share, and megabytes per client and round against full fine-tuning.
    """
    targets, changes = _sorted_out(arguments, overrides)
    target = Path(_only(targets, "info"))
    if target.is_dir() and changes:
        raise UsageError(f"{target} is a run, whose configuration cannot be changed any more")
    from fedclip.cli_support import show
    from fedclip.inspection import info as describe

    show(describe(target, changes), as_json)


@app.command()
def evaluate(folder: RunPath, as_json: AsJson = False) -> None:
    """Measure a run's adapter again.

    RUN is a folder that `fedclip run` made; its test sets are used.
    """
    from fedclip.cli_support import show
    from fedclip.inspection import evaluate as measure
    from fedclip.reports.progress import make_progress

    show(measure(folder, listener=make_progress()), as_json)


@app.command()
def predict(
    folder: RunPath,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", hidden=True)],
    labels: Annotated[
        str | None,
        typer.Option("--labels", metavar='"A,B,C"', help="Other class names, comma-separated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Classify images with a run's adapter.

    RUN is a folder that `fedclip run` made, IMAGE an image file.
    """
    names = None
    if labels is not None:
        names = [name.strip() for name in labels.split(",")]
        if not all(names):
            raise UsageError(f'--labels must be names separated by commas, got "{labels}"')
        if len(set(names)) < len(names):
            raise UsageError(f'--labels names a class twice: "{labels}"')
    from fedclip.cli_support import show_rows
    from fedclip.inspection import predict as classify

    show_rows(classify(folder, images, names), as_json)


@app.command()
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
    as_json: AsJson = False,
) -> None:
    """Write a run's model for other programs.

    RUN is a folder that `fedclip run` made, or an adapter folder.
    """
    from fedclip.cli_support import show
    from fedclip.export import export as write

    show(write(folder, to, output), as_json)


@app.command()
def merge(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", hidden=True)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new adapter folder.")],
    method: Annotated[
        str,
        typer.Option(
            help="linear, cat, svd, task-arithmetic, ties, dare or knots: see the page on merging."
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
    seed: Annotated[int, typer.Option(help="Seed of what dare drops and of the search.")] = 0,
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
    from fedclip.cli_support import merge_adapters

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


def _sorted_out(
    arguments: list[str] | None, overrides: list[str] | None
) -> tuple[list[str], list[str]]:
    """Files and `key=value` texts apart; a file whose name has a `=` in it is a file."""
    arguments = arguments or []
    files = [text for text in arguments if "=" not in text or Path(text).exists()]
    return files, [text for text in arguments if text not in files] + (overrides or [])


def _only(files: list[str], command: str) -> str:
    if len(files) == 1:
        return files[0]
    if files:
        raise UsageError(
            f"fedclip {command} takes one CONFIG, got {', '.join(files)}; "
            "keys are changed by key=value"
        )
    raise UsageError(f"fedclip {command} needs a CONFIG file, such as configs/quickstart.yaml")


def _load(file: str, overrides: list[str]) -> Config:
    from fedclip.config_io import load_config

    return load_config(Path(file), overrides)


def main() -> None:
    """Run the command line, and end the process with the exit code that fits."""
    from fedclip.cli_support import exit_code_of

    raise SystemExit(exit_code_of(lambda: app(standalone_mode=False)))


if __name__ == "__main__":
    main()
