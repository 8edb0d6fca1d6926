"""Predictions as text, a piece at a time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from fedclip.errors import UsageError

Prediction = Mapping[str, Any]


def columns(prediction: Prediction, top: int) -> dict[str, Any]:
    """A prediction as one flat row: image, label, confidence, label_2, confidence_2 and so on."""
    row = {"image": prediction["image"]}
    for place, (label, score) in enumerate(islice(prediction["scores"].items(), top), start=1):
        ending = "" if place == 1 else f"_{place}"
        row |= {f"label{ending}": label, f"confidence{ending}": score}
    return row


def cut(prediction: Prediction, top: int | None) -> dict[str, Any]:
    """A prediction with the `top` highest scores only; None keeps all."""
    return {**prediction, "scores": dict(islice(prediction["scores"].items(), top))}


def as_json(predictions: Iterable[Prediction], top: int | None) -> Iterator[str]:
    """One JSON list, laid out as `json.dumps(..., indent=2)` does."""
    before = "["
    for prediction in predictions:
        text = json.dumps(cut(prediction, top), indent=2, ensure_ascii=False)
        yield before + "\n  " + text.replace("\n", "\n  ")
        before = ","
    yield "[]\n" if before == "[" else "\n]\n"


def as_jsonl(predictions: Iterable[Prediction], top: int | None) -> Iterator[str]:
    """One JSON object on each line."""
    for prediction in predictions:
        yield json.dumps(cut(prediction, top), ensure_ascii=False) + "\n"


def as_csv(predictions: Iterable[Prediction], top: int | None) -> Iterator[str]:
    """A line of names, then a line for each image; `top` labels each, by default one."""
    named = False
    for prediction in predictions:
        row = columns(prediction, top or 1)
        if not named:
            yield _line(row)
            named = True
        yield _line(row.values())
    if not named:
        yield _line(["image", "label", "confidence"])


def _line(cells: Iterable[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


Format = Callable[[Iterable[Prediction], int | None], Iterator[str]]
FORMATS: dict[str, Format] = {".csv": as_csv, ".json": as_json, ".jsonl": as_jsonl}


def format_of(file: Path) -> Format:
    """The format that a file's suffix asks for; UsageError for an unknown one."""
    if file.suffix.lower() not in FORMATS:
        raise UsageError(
            f"--output must end in {', '.join(FORMATS)}, which chooses the format; got {file}"
        )
    if not file.parent.is_dir():
        raise UsageError(f"--output: there is no folder {file.parent}; make it first")
    return FORMATS[file.suffix.lower()]
