"""Plots of an evaluation in detail (`evaluation.detail.in_detail`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedclip.reports.curves import png
from fedclip.reports.text import no_formula

_MOST_NUMBERS = 20  # classes up to which a matrix has its numbers written in
_MOST_NAMES = 60  # and its class names at the sides


def plots(detail: Mapping[str, Any]) -> dict[str, bytes]:
    """All plots as PNG, by file name."""
    return {
        "confusion.png": confusion_png(detail),
        "reliability.png": reliability_png(detail),
        "classes.png": classes_png(detail),
    }


def confusion_png(detail: Mapping[str, Any]) -> bytes:
    """Both confusion matrices: colours are shares of a row, numbers are examples."""
    names = [row["class"] for row in detail["classes"]]
    size = min(14.0, 3 + 0.28 * len(names))
    figure = Figure(figsize=(2 * size, size), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("base", "trained"), strict=True):
        counts = np.array(detail["confusion"][name])  # [classes, classes]
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="predicted", ylabel="true", title=_title(detail, name))
        shown = range(len(names)) if len(names) <= _MOST_NAMES else ()
        axes.set_xticks(shown, [no_formula(names[i]) for i in shown], rotation=90, fontsize="small")
        axes.set_yticks(shown, [no_formula(names[i]) for i in shown], fontsize="small")
        if len(names) <= _MOST_NUMBERS:
            for (row, column), count in np.ndenumerate(counts):
                dark = shares[row, column] > 0.5
                style = {"ha": "center", "va": "center", "fontsize": "small"}
                axes.text(column, row, str(count), color="white" if dark else "black", **style)
    return png(figure)


def reliability_png(detail: Mapping[str, Any]) -> bytes:
    """Accuracy by confidence, against the diagonal on which confidence is right."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("base", "trained"), strict=True):
        bins = [row for row in detail["reliability"][name] if row["examples"]]
        width = bins[0]["to"] - bins[0]["from"] if bins else 1.0
        axes.bar(
            [row["from"] for row in bins],
            [row["accuracy"] for row in bins],
            width=width,
            align="edge",
            edgecolor="white",
            label="accuracy",
        )
        axes.plot(
            [row["confidence"] for row in bins],
            [row["accuracy"] for row in bins],
            "o",
            color="tab:orange",
            label="at the mean confidence",
        )
        axes.plot([0, 1], [0, 1], "--", color="grey", label="well calibrated")
        error = detail[name]["calibration_error"]
        told = "" if error is None else f", calibration error {error:.3f}"
        axes.set(xlabel="confidence", title=f"{name}{told}", xlim=(0, 1), ylim=(0, 1))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy")
    figure.axes[0].legend(fontsize="small", loc="upper left")
    return png(figure)


def classes_png(detail: Mapping[str, Any]) -> bytes:
    """Recall of each class before (hollow) and after (filled), worst change on top."""
    known = [row for row in detail["classes"] if row["change"] is not None]
    rows: Sequence[Mapping[str, Any]] = sorted(known, key=lambda row: -row["change"])
    figure = Figure(figsize=(7, min(40.0, 1.5 + 0.25 * len(rows))), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        colour = "tab:red" if row["change"] < 0 else "tab:blue"
        axes.plot([row["base_recall"], row["recall"]], [place, place], color=colour)
        axes.plot(row["base_recall"], place, "o", color=colour, markerfacecolor="white")
        axes.plot(row["recall"], place, "o", color=colour)
    axes.set_yticks(range(len(rows)), [no_formula(row["class"]) for row in rows], fontsize="small")
    axes.set(
        xlabel="recall", xlim=(-0.02, 1.02), title="Each class, base model (hollow) to trained"
    )
    axes.grid(alpha=0.3)
    return png(figure)


def _title(detail: Mapping[str, Any], name: str) -> str:
    accuracy = detail[name]["accuracy"]
    return name if accuracy is None else f"{name}, accuracy {accuracy:.3f}"
