"""The commands on finished runs: each calls one function, imported inside it as in `cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedclip.cli.options import AsJson, Best, RunPath
from fedclip.errors import UsageError

Labels = Annotated[
    str | None,
    typer.Option("--labels", metavar='"A,B,C"', help="Other class names, comma-separated."),
]


def evaluate(
    folder: RunPath,
    full: Annotated[
        bool,
        typer.Option("--full", help="Also by class, site and confidence, beside the base model."),
    ] = False,
    plots: Annotated[
        Path | None,
        typer.Option("--plots", metavar="DIR", help="Write plots of these as PNG; means --full."),
    ] = None,
    best: Best = False,
    as_json: AsJson = False,
) -> None:
    """Measure a run's adapter again.

    RUN is a folder that `fedclip run` made; its test sets are used.
    """
    from fedclip.cli.endings import say_loading

    say_loading(f"evaluation of {folder}")
    from fedclip import evaluate as measure
    from fedclip.cli.console import show_evaluation, write_plots
    from fedclip.reports.progress import make_progress

    figures = measure(folder, listener=make_progress(), detail=full or plots is not None, best=best)
    if plots is not None:
        write_plots(figures["detail"], plots)
    show_evaluation(figures, as_json)


def predict(
    folder: RunPath,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE|FOLDER|GLOB...", hidden=True)],
    labels: Labels = None,
    batch_size: Annotated[
        int,
        typer.Option("--batch-size", min=1, max=100_000, help="Images in one pass, and in memory."),
    ] = 64,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="A .csv, .json or .jsonl to write."),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            "--top", min=1, max=1_000_000, metavar="K", help="The K likeliest labels of each image."
        ),
    ] = None,
    on_bad: Annotated[
        Literal["fail", "skip"],
        typer.Option("--on-bad", help="An unreadable image: stop before all work, or leave out."),
    ] = "fail",
    best: Best = False,
    as_json: AsJson = False,
) -> None:
    """Classify images with a run's adapter.

    RUN is a folder that `fedclip run` made, an adapter folder, or a model of `fedclip export --to
    merged`. Images are files, folders (with all below them), or
    patterns in quotes. With --on-bad skip the exit code is 1 if any image was left out.
    """
    names = label_list(labels)
    from fedclip.cli.console import show_rows, warn
    from fedclip.cli.predict import predict as classify

    code = classify(
        folder,
        images,
        names,
        batch_size=batch_size,
        output=output,
        top=top,
        skip_bad=on_bad == "skip",
        best=best,
        to_json=as_json,
        show_rows=lambda rows: show_rows(rows, as_json=False),
        warn=warn,
    )
    raise typer.Exit(code)


def serve(
    folder: RunPath,
    host: Annotated[
        str, typer.Option("--host", help="The address to listen at; 0.0.0.0 is every one.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="The port; 0 takes a free one.")
    ] = 8000,
    max_mb: Annotated[
        float, typer.Option("--max-mb", min=0.001, max=1000, help="Largest image, in megabytes.")
    ] = 10,
    labels: Labels = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", metavar="NAME", help="Also answer to this host name; repeatable."
        ),
    ] = None,
    best: Best = False,
    signed_by: Annotated[
        list[Path] | None,
        typer.Option(
            "--signed-by",
            metavar="FILE",
            help="Serve only with a statement signed by this key or authority; repeatable.",
        ),
    ] = None,
) -> None:
    """Serve a run's adapter by HTTP, with a web page.

    RUN is a folder that `fedclip run` made, an adapter folder, or a model of `fedclip export --to
    merged`. Ctrl-C stops the server.
    """
    names = label_list(labels)
    from fedclip.adapters.serve.start import serve as listen
    from fedclip.cli.console import say, warn

    if signed_by:
        from fedclip.adapters.load import adapter_folder
        from fedclip.deploy.log.adapter_statement import verify_adapter

        verify_adapter(adapter_folder(folder, best), signed_by)

    listen(
        folder,
        host=host,
        port=port,
        max_mb=max_mb,
        labels=names,
        allow_hosts=allow_host or (),
        best=best,
        say=say,
        warn=warn,
    )


def card(
    folder: RunPath,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write it here instead of printing."),
    ] = None,
    best: Best = False,
) -> None:
    """Describe a run's adapter in a model card.

    RUN is a folder that `fedclip run` made. The card is Markdown in the hub's format.
    """
    from fedclip.adapters.card import run_card

    text = run_card(folder, best=best)
    if output is None:
        typer.echo(text, nl=False)
        return
    from fedclip import files

    try:
        files.replace_file(output, text.encode())
    except OSError as error:
        raise UsageError(f"--output {output}: {error.strerror or error}") from None


def push(
    folder: RunPath,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", hidden=True)],
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is new, only you may see it.")
    ] = False,
    best: Best = False,
) -> None:
    """Upload a run's adapter and card to the hub.

    RUN is a folder that `fedclip run` made, REPO_ID the repository, such as user/name.
    """
    from fedclip.adapters.push import push as upload

    typer.echo(upload(folder, repo_id, private=private, best=best))


def label_list(labels: str | None) -> list[str] | None:
    """Class names from a text with commas; UsageError for an empty one or one given twice."""
    if labels is None:
        return None
    names = [name.strip() for name in labels.split(",")]
    if not all(names):
        raise UsageError(f'--labels must be names separated by commas, got "{labels}"')
    if len(set(names)) < len(names):
        raise UsageError(f'--labels names a class twice: "{labels}"')
    return names
