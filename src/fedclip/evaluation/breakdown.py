"""What a model gets right and how sure it is, class by class and site by site."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedclip.evaluation.metrics import METRICS, accuracy, reliability
from fedclip.evaluation.predictions import Predictions


def in_detail(
    trained: Predictions,
    base: Predictions,
    sites: Mapping[str, tuple[Predictions, Predictions]],
    class_names: Sequence[str],
) -> dict[str, Any]:
    """All figures of a trained model beside those of its base, on the same examples.

    `sites` holds each client's predictions, trained and base. A figure without examples is None.
    """
    both = {"trained": trained, "base": base}
    return {
        "examples": len(trained),
        **{name: _figures(found) for name, found in both.items()},
        "classes": class_rows(trained, base, class_names),
        "sites": [
            {
                "client_id": client_id,
                "examples": len(after),
                **_change("accuracy", accuracy(before), accuracy(after)),
            }
            for client_id, (after, before) in sites.items()
        ],
        "confusion": {name: confusion(found, len(class_names)) for name, found in both.items()},
        "reliability": {name: reliability(found) for name, found in both.items()},
    }


def class_rows(
    trained: Predictions, base: Predictions, class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """By class, recall (the share of its examples that are found), precision and F1.

    `base_recall` is the base model's; `change` below zero is what training forgot of the class.
    """
    precision, recall, f1, support = _by_class(trained, len(class_names))
    before = _by_class(base, len(class_names))[1]
    return [
        {
            "class": name,
            "examples": int(support[c]),
            **_change("recall", _known(before[c]), _known(recall[c])),
            "precision": _known(precision[c]),
            "f1": _known(f1[c]),
        }
        for c, name in enumerate(class_names)
    ]


def confusion(found: Predictions, num_classes: int) -> list[list[int]]:
    """Number of examples by true class (rows) and predicted class (columns)."""
    pairs = found.labels * num_classes + found.predicted
    counts = np.bincount(pairs, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).tolist()


def _figures(found: Predictions) -> dict[str, float | None]:
    return {name: METRICS[name](found) for name in ("accuracy", "macro_f1", "calibration_error")}


def _change(name: str, before: float | None, after: float | None) -> dict[str, float | None]:
    change = None if before is None or after is None else after - before
    return {name: after, f"base_{name}": before, "change": change}


def _by_class(found: Predictions, num_classes: int) -> Any:
    """Precision, recall, F1 and number of examples, each `[classes]`; NaN where undefined."""
    if not len(found):
        nothing = np.full(num_classes, np.nan)
        return nothing, nothing, nothing, np.zeros(num_classes, np.int64)
    from sklearn.metrics import precision_recall_fscore_support  # slow to import

    return precision_recall_fscore_support(
        found.labels, found.predicted, labels=np.arange(num_classes), zero_division=np.nan
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
