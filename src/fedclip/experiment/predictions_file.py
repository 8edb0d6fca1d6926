"""`predictions.json`: the last predictions on the test images, and a few of those images.

Only what is on this machine is kept: the data of a simulation, or the coordinator's own test
images. Of private runs nothing is.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pydantic import ValidationError

from fedclip.errors import UsageError, first_fault
from fedclip.experiment.context import RunContext, Task
from fedclip.experiment.evaluate import evaluate_run
from fedclip.experiment.folder import PREDICTIONS, RunFolder
from fedclip.records import RunState
from fedclip.reports.report.record import LastPredictions

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLES = 12
"""Images of right answers, and as many of wrong ones, by task."""
_MOST_TASKS = 8  # with images: a page has at most 3 MB
_SMALL, _EDGE = 64, 112  # pixels: up to the first an image stays as it is


def write_predictions(
    context: RunContext, state: RunState, folder: RunFolder, personal: bool
) -> None:
    """Write the predictions of the state that a run ends with; nothing without test images."""
    if context.config.task == "contrastive":
        return
    if not all(task.last_test for task in context.tasks.values()):  # stopped after the last round
        evaluate_run(context, state, personal=personal)
    found = {
        name: _record(task, with_images=number < _MOST_TASKS)
        for number, (name, task) in enumerate(context.tasks.items())
        if len(task.last_test[0].rows)
    }
    if found:
        folder.write_json(PREDICTIONS, found)


def read_predictions(folder: RunFolder) -> dict[str, LastPredictions]:
    """Read what `write_predictions` wrote, by task; nothing where there is no such file."""
    if not (folder.path / PREDICTIONS).exists():
        return {}
    found = folder.read_json(PREDICTIONS)
    try:
        return {
            task: LastPredictions.model_validate_json(json.dumps(own))
            for task, own in found.items()
        }
    except ValidationError as error:
        raise UsageError(
            f"{folder.path / PREDICTIONS} is damaged: {first_fault(error)}; delete it, and the "
            "report does without"
        ) from None


def _record(task: Task, with_images: bool) -> dict[str, Any]:
    found, rows = task.last_test[0]
    pairs, counts = np.unique(np.stack([found.labels, found.predicted]), axis=1, return_counts=True)
    chosen = _samples(found.labels, found.predicted, found.confidence) if with_images else ()
    return {
        "class_names": list(task.data.class_names),
        "confusion": np.vstack([pairs, counts]).T.tolist(),
        "samples": [
            {
                "image": _data_uri(task.data.pixels[rows[i]]),
                "label": int(found.labels[i]),
                "predicted": int(found.predicted[i]),
                "confidence": round(float(found.confidence[i]), 4),
                "place": _place(task, int(rows[i])),
            }
            for i in chosen
        ],
    }


def _samples(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], confidence: NDArray[np.float64]
) -> Iterator[int]:
    """The surest mistakes, and right answers of as many classes as there is room for."""
    order = np.argsort(-confidence, kind="stable")
    wrong = order[labels[order] != predicted[order]]
    right = np.flatnonzero(labels == predicted)
    nth = np.array([np.sum(labels[right[:i]] == labels[right[i]]) for i in range(len(right))])
    yield from wrong[:SAMPLES].tolist()
    yield from right[np.argsort(nth, kind="stable")][:SAMPLES].tolist() if len(right) else ()


def _place(task: Task, row: int) -> str:
    """The path of an image in its folder, or its row; empty where neither is known."""
    places = task.data.places
    if not places:
        return ""
    return place if isinstance(place := places[row], str) else f"row {place}"


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    """Pixels `[3, size, size]` as the source of an HTML image."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    small = max(image.size) <= _SMALL
    if not small:
        image.thumbnail((_EDGE, _EDGE))
    data = io.BytesIO()
    image.save(data, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
