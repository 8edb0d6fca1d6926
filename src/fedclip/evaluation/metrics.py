"""Metrics: figures of one record of predictions, by name.

A metric is a function `Predictions -> float | None`, None where it is undefined (no examples).
One more is a function and its row in `METRICS`, an entry point `fedclip.metrics` of another
package, or `path/to/file.py:Name`. `evaluation.metrics` selects among them, and each selected one
is computed on every evaluated set: central test, validation, and each client's test set.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedclip.catalog import short_name
from fedclip.config.lookup import load
from fedclip.errors import UsageError

if TYPE_CHECKING:
    from fedclip.evaluation.predictions import Predictions

Metric = Callable[["Predictions"], float | None]

BINS = 15


def accuracy(found: Predictions) -> float | None:
    """Share of the examples that are classified correctly."""
    return _mean(found.correct)


def loss(found: Predictions) -> float | None:
    """Mean cross-entropy, in nats."""
    return _mean(found.losses)


def macro_f1(found: Predictions) -> float | None:
    """Mean F1 over the classes that occur, as a label or as a prediction; each counts the same."""
    if not len(found):
        return None
    # 2 TP / (labels + predictions), to the bit as in scikit-learn, which takes long to import.
    count = max(found.labels.max(), found.predicted.max()) + 1
    hits = np.bincount(found.labels[found.labels == found.predicted], minlength=count)
    of_class = np.bincount(found.labels, minlength=count) + np.bincount(
        found.predicted, minlength=count
    )
    return float(np.mean(2 * hits[of_class > 0] / of_class[of_class > 0]))


def balanced_accuracy(found: Predictions) -> float | None:
    """Mean recall over the classes that occur as a label."""
    return _mean(np.array(list(recalls(found).values())))


def majority_class_rate(found: Predictions) -> float | None:
    """Accuracy of always answering the most frequent class: the share of that class."""
    return float(np.bincount(found.labels).max() / len(found)) if len(found) else None


def calibration_error(found: Predictions, bins: int = BINS) -> float | None:
    """Expected calibration error (ECE), by equally wide bins of confidence.

    ECE = sum over bins m of |B_m| / n * |acc(B_m) - conf(B_m)|. Source: Guo et al. 2017,
    arXiv:1706.04599, equation 3.
    """
    if not len(found):
        return None
    gaps = (
        row["examples"] * abs(row["accuracy"] - row["confidence"])
        for row in reliability(found, bins)
        if row["examples"]
    )
    return sum(gaps) / len(found)


METRICS: Mapping[str, Metric] = {
    "accuracy": accuracy,
    "loss": loss,
    "macro_f1": macro_f1,
    "balanced_accuracy": balanced_accuracy,
    "majority_class_rate": majority_class_rate,
    "calibration_error": calibration_error,
}


RESERVED = frozenset(
    [
        "accuracy",
        "accuracy_by_client",
        "accuracy_by_task",
        "adapter_folders",
        "adapter_sha256",
        "adapters",
        "bad_images",
        "base_accuracy",
        "base_parameters",
        "base_zero_shot_accuracy",
        "best",
        "bytes_down",
        "bytes_down_per_client_round",
        "bytes_up",
        "bytes_up_per_client_round",
        "classes_not_tested",
        "classes_not_validated",
        "client_accuracy",
        "clients",
        "clients_per_round",
        "data",
        "device",
        "engine",
        "epsilon",
        "epsilon_rdp",
        "forgetting",
        "groups",
        "harmonic_mean",
        "initial_accuracy",
        "input_size",
        "learning_rate",
        "loss",
        "macro_f1",
        "macro_f1_by_task",
        "majority_class_rate",
        "majority_class_rate_by_task",
        "metrics",
        "model",
        "new_accuracy",
        "new_zero_shot_accuracy",
        "num_examples",
        "personal",
        "precision",
        "privacy",
        "records_sha256",
        "retrieval",
        "rounds",
        "seconds",
        "seed",
        "server_round",
        "shrunk",
        "state_sha256",
        "stopped_by",
        "strategy",
        "summary_sha256",
        "task",
        "tasks",
        "test_examples",
        "test_hits",
        "test_loss",
        "total_parameters",
        "trainable_parameters",
        "update_norm",
        "validation_accuracy",
        "validation_accuracy_by_task",
        "validation_loss",
        "versions",
        "worst_class",
        "worst_class_by_task",
        "worst_site",
        "zero_shot_accuracy",
        "zero_shot_harmonic_mean",
        "zero_shot_macro_f1",
        "zero_shot_retrieval",
        "zero_shot_worst_class",
    ]
)
"""Keys of a run's records and summary that no metric may take, but for those of that name."""


def chosen(names: Iterable[str]) -> dict[str, Metric]:
    """The metrics that `evaluation.metrics` names, by the key of their figures.

    Accuracy and loss are always there, and left out here. Raises UsageError for what is no metric.
    """
    metrics: dict[str, Metric] = {}
    for name in names:
        key = short_name(name)
        if name in ("accuracy", "loss"):
            continue
        taken = key in RESERVED and name not in METRICS
        if key in metrics or taken or not re.fullmatch(r"[\w-]+", key):
            raise UsageError(
                f"evaluation.metrics: {name!r} would be written as {key!r}, which is taken or no "
                "plain name; give the function another name, and name each metric once"
            )
        metric = load("metrics", name)
        if not callable(metric):
            raise UsageError(f"evaluation.metrics: {name} is no function, got {metric!r}")
        metrics[key] = _checked(name, metric)
    return metrics


def _checked(name: str, metric: Metric) -> Metric:
    """The metric, whose figure is a finite number or None, and whose failure names it."""

    def checked(found: Predictions) -> float | None:
        if not len(found):
            return None
        try:
            value = metric(found)
            figure = None if value is None else float(value)
        except Exception as error:
            raise UsageError(
                f"evaluation.metrics: {name} failed on {len(found)} predictions: "
                f"{type(error).__name__}: {error}; a metric takes a record of predictions and "
                "gives a number or None"
            ) from error
        return None if figure is None or not math.isfinite(figure) else figure

    return checked


def recalls(found: Predictions) -> dict[int, float]:
    """Recall of each class that occurs as a label, by its number."""
    return {int(c): float(found.correct[found.labels == c].mean()) for c in np.unique(found.labels)}


def worst_class(found: Predictions) -> tuple[int, float] | None:
    """The class of the lowest recall, the first of equals, with it; None without examples."""
    by_class = recalls(found)
    return min(by_class.items(), key=lambda item: item[1]) if by_class else None


CLASS_FIGURES = ("majority_class_rate", "macro_f1", "worst_class")


def class_figures(found: Predictions, class_names: Sequence[str]) -> dict[str, Any]:
    """What accuracy alone hides: the majority-class rate, macro-F1, and the worst class's recall.

    Every evaluation of a classifier has them; each is None without examples.
    """
    worst = worst_class(found)
    return {
        "majority_class_rate": majority_class_rate(found),
        "macro_f1": macro_f1(found),
        "worst_class": worst and {"name": class_names[worst[0]], "recall": worst[1]},
    }


def reliability(found: Predictions, bins: int = BINS) -> list[dict[str, Any]]:
    """Examples, accuracy and mean confidence by confidence, in `bins` equal parts of (0, 1].

    Bin m of M is ((m - 1) / M, m / M]. Source: Guo et al. 2017, arXiv:1706.04599, section 2.
    """
    place = np.clip(np.ceil(found.confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    rows = []
    for m in range(bins):
        inside = found.of(np.flatnonzero(place == m))
        rows.append(
            {
                "from": m / bins,
                "to": (m + 1) / bins,
                "examples": len(inside),
                "accuracy": accuracy(inside),
                "confidence": _mean(inside.confidence),
            }
        )
    return rows


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None
