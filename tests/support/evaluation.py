"""Predictions made by hand."""

from __future__ import annotations

import numpy as np

from fedclip.evaluation.predictions import Predictions


def made(
    labels: list[int],
    predicted: list[int],
    confidence: list[float] | None = None,
    losses: list[float] | None = None,
) -> Predictions:
    """Predictions of these classes; the logits are a one for the predicted class."""
    classes = max([-1, *labels, *predicted]) + 1
    return Predictions(
        np.array(labels, np.int64),
        np.array(predicted, np.int64),
        np.array(confidence or [0.5] * len(labels)),
        np.array(losses or [0.0] * len(labels)),
        np.eye(classes, dtype=np.float32)[np.array(predicted, np.int64)],
    )
