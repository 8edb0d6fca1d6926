"""Plot of an audit: the scores of those in and out, and how well they can be told apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclip.reports.curves import drawn


def audit_plot(
    scores: NDArray[np.float64],
    inside: NDArray[np.bool_],
    figures: Mapping[str, Any],
    form: str,
) -> bytes:
    """Histograms of the scores, and the ROC curve with the one that the promise allows at most."""
    from fedclip.reports.notebook_figure import NotebookFigure

    figure = NotebookFigure(figsize=(9, 3.8))
    figure.subplots_adjust(left=0.07, right=0.985, bottom=0.14, top=0.91, wspace=0.2)
    histogram, roc = figure.subplots(1, 2)
    own, others = scores[inside], scores[~inside]
    bins = np.linspace(np.quantile(scores, 0.005), np.quantile(scores, 0.995), 41)
    histogram.hist(others, bins, alpha=0.6, density=True, label=f"out ({len(others):,})")
    histogram.hist(own, bins, alpha=0.6, density=True, label=f"in ({len(own):,})")
    histogram.set(xlabel="score", ylabel="density", title="Scores of those in and out")
    thresholds = np.unique(scores)[::-1]
    false = 1 - np.searchsorted(np.sort(others), thresholds) / len(others)
    true = 1 - np.searchsorted(np.sort(own), thresholds) / len(own)
    roc.plot([0, *false, 1], [0, *true, 1], label=f"attack, AUC {figures['auc']:.3f}")
    epsilon, delta = figures["epsilon_promised"], figures["delta"]
    if epsilon is not None:
        x = np.linspace(0, 1, 201)
        most = np.minimum(np.exp(epsilon) * x + delta, 1 - np.exp(-epsilon) * (1 - delta - x))
        roc.plot(x, np.minimum(most, 1), "--", label=f"most at epsilon {epsilon:.3g}")
    roc.plot([0, 1], [0, 1], ":", color="grey", label="chance")
    roc.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
    for axes in (histogram, roc):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return drawn(figure, form)
