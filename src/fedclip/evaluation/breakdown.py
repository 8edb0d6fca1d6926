"""What a model gets right and how sure it is, class by class and site by site."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.metrics import f1_score, precision_recall_fscore_support

from fedclip.device import at_least_fp32
from fedclip.evaluation.accuracy import Classifier, Images, each_batch

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINS = 15


@dataclass(frozen=True)
class Answers:
    """What a model said of `n` examples: true and predicted classes, int64 `[n]`.

    `confidence` `[n]` is the probability of the predicted class.
    """

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Which examples were classified correctly, `[n]`."""
        return self.labels == self.predicted

    def of(self, rows: NDArray[np.int64]) -> Answers:
        """The answers on some of the examples, by their place among these."""
        return Answers(self.labels[rows], self.predicted[rows], self.confidence[rows])

    @classmethod
    def together(cls, parts: Sequence[Answers]) -> Answers:
        """Answers of several models on examples of their own, one after another."""
        return cls(
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.predicted for part in parts]),
            np.concatenate([part.confidence for part in parts]),
        )


@torch.inference_mode()
def answers(
    model: Classifier,
    images: Images,
    labels: NDArray[np.int64],
    indices: NDArray[np.int64],
    *,
    device: torch.device,
    precision: str,
    batch_size: int,
) -> Answers:
    """A model's answers on the given examples, in their order; repeated ones are computed once."""
    unique, places = np.unique(indices, return_inverse=True)
    predicted, confidence = [np.empty(0, np.int64)], [np.empty(0, np.float64)]
    for _, logits in each_batch(model, images, unique, device, precision, batch_size):
        best = at_least_fp32(logits).double().softmax(dim=-1).max(dim=-1)
        predicted.append(best.indices.cpu().numpy())
        confidence.append(best.values.cpu().numpy())
    found = Answers(labels[unique], np.concatenate(predicted), np.concatenate(confidence))
    return found.of(places)


def in_detail(
    trained: Answers,
    base: Answers,
    sites: Mapping[str, tuple[Answers, Answers]],
    class_names: Sequence[str],
) -> dict[str, Any]:
    """All figures of a trained model beside those of its base, on the same examples.

    `sites` holds each client's answers, trained and base. A figure without examples is None.
    """
    both = {"trained": trained, "base": base}
    return {
        "examples": len(trained.labels),
        **{name: _figures(found) for name, found in both.items()},
        "classes": class_rows(trained, base, class_names),
        "sites": [
            {
                "client_id": client_id,
                "examples": len(after.labels),
                **_change("accuracy", _accuracy(before), _accuracy(after)),
            }
            for client_id, (after, before) in sites.items()
        ],
        "confusion": {name: confusion(found, len(class_names)) for name, found in both.items()},
        "reliability": {name: reliability(found) for name, found in both.items()},
    }


def class_rows(trained: Answers, base: Answers, class_names: Sequence[str]) -> list[dict[str, Any]]:
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


def confusion(found: Answers, num_classes: int) -> list[list[int]]:
    """Number of examples by true class (rows) and predicted class (columns)."""
    pairs = found.labels * num_classes + found.predicted
    counts = np.bincount(pairs, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).tolist()


def macro_f1(found: Answers) -> float | None:
    """Mean F1 over the classes that occur, as a label or as an answer; each counts the same."""
    if not len(found.labels):
        return None
    return float(f1_score(found.labels, found.predicted, average="macro", zero_division=0))


def reliability(found: Answers, bins: int = BINS) -> list[dict[str, Any]]:
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
                "examples": len(inside.labels),
                "accuracy": _accuracy(inside),
                "confidence": float(inside.confidence.mean()) if len(inside.labels) else None,
            }
        )
    return rows


def expected_calibration_error(found: Answers, bins: int = BINS) -> float | None:
    """Mean distance between confidence and accuracy over the bins, weighted by their examples.

    ECE = sum over m of |B_m| / n * |acc(B_m) - conf(B_m)|. Source: Guo et al. 2017,
    arXiv:1706.04599, equation 3.
    """
    if not len(found.labels):
        return None
    gaps = (
        row["examples"] * abs(row["accuracy"] - row["confidence"])
        for row in reliability(found, bins)
        if row["examples"]
    )
    return sum(gaps) / len(found.labels)


def _figures(found: Answers) -> dict[str, float | None]:
    return {
        "accuracy": _accuracy(found),
        "macro_f1": macro_f1(found),
        "calibration_error": expected_calibration_error(found),
    }


def _change(name: str, before: float | None, after: float | None) -> dict[str, float | None]:
    change = None if before is None or after is None else after - before
    return {name: after, f"base_{name}": before, "change": change}


def _accuracy(found: Answers) -> float | None:
    return float(found.correct.mean()) if len(found.labels) else None


def _by_class(found: Answers, num_classes: int) -> Any:
    """Precision, recall, F1 and number of examples, each `[classes]`; NaN where undefined."""
    if not len(found.labels):
        nothing = np.full(num_classes, np.nan)
        return nothing, nothing, nothing, np.zeros(num_classes, np.int64)
    return precision_recall_fscore_support(
        found.labels, found.predicted, labels=np.arange(num_classes), zero_division=np.nan
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
