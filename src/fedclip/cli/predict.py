"""What `fedclip predict` does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from fedclip import files
from fedclip.adapters.find_images import find_images
from fedclip.adapters.predict import Predictor, predictions
from fedclip.adapters.prediction_files import Format, as_json, columns, format_of
from fedclip.errors import FedclipError, harmless
from fedclip.reports.listener import Listener
from fedclip.reports.progress import make_progress
from fedclip.reports.text import printable_json

Rows = Iterable[dict[str, Any]]


def predict(
    folder: Path,
    images: Sequence[Path],
    labels: Sequence[str] | None,
    *,
    batch_size: int,
    output: Path | None,
    top: int | None,
    skip_bad: bool,
    best: bool,
    to_json: bool,
    show_rows: Callable[[list[dict[str, Any]]], None],
    warn: Callable[[str], None],
) -> int:
    """Classify images into a file, as JSON on standard output, or by `show_rows`.

    Returns the exit code: 1 when an image could not be read and `skip_bad` let it be left out.
    """
    form = format_of(output) if output else None
    paths = find_images(images)
    predictor = Predictor.of_run(folder, labels, best=best)
    bad: list[str] = []

    def skip(message: str) -> None:
        bad.append(message)
        warn(f"{message}; left out")

    # Bars would stand among the lines of JSON on a terminal.
    quiet = len(paths) <= batch_size or (to_json and output is None)
    with nullcontext(Listener()) if quiet else make_progress() as listener:
        found = predictions(
            predictor,
            paths,
            batch_size=batch_size,
            on_bad=skip if skip_bad else None,
            progress=listener.images,
        )
        if output is not None and form is not None:
            _write(found, output, form, top)
            rows = []
        elif to_json:
            for text in as_json(found, top):
                click.echo(printable_json(text), nl=False)
        else:
            rows = [columns(prediction, top or 1) for prediction in found]
    if output is not None:
        click.echo(harmless(f"{len(paths) - len(bad)} predictions: {output}"))
    elif not to_json:
        show_rows(rows)
    if bad:
        warn(f"{len(bad)} of {len(paths)} images could not be read and were left out")
    return 1 if bad else 0


def _write(found: Rows, output: Path, form: Format, top: int | None) -> None:
    try:
        with files.draft_file(output) as file:
            file.writelines(form(found, top))
    except OSError as error:
        raise FedclipError(f"{output} cannot be written: {error.strerror or error}") from error
