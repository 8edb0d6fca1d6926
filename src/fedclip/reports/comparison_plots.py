"""Plots of a comparison, from the figures of its arms (`bench.statistics.arm_figures`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedclip.reports.text import no_formula

Rows = Mapping[str, Mapping[str, Any]]


def accuracy_plot(rows: Rows) -> Figure:
    """A dot with its 95 % interval for each arm, best on top, and the zero-shot line."""
    figure = Figure(figsize=(7, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    upwards = list(rows)[::-1]
    for place, arm in enumerate(upwards):
        _dot(axes, rows[arm]["accuracy"]["mean"], place, rows[arm], axis="x")
    axes.set_yticks(range(len(rows)), [no_formula(arm) for arm in upwards])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    zero_shot = [row["zero_shot_accuracy"]["mean"] for row in rows.values()]
    axes.axvline(sum(zero_shot) / len(zero_shot), linestyle="--", color="grey", label="zero-shot")
    axes.set(xlabel="accuracy", title="Accuracy, mean and 95 % interval")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def crossed_plot(rows: Rows, arms: Sequence[str], ends: Mapping[str, str]) -> Figure:
    """Accuracy of each arm at each combination of a grid's factors, as a map with its numbers."""
    arms = [arm for arm in arms if any(arm + end in rows for end in ends)]
    means = np.array(
        [
            [rows[arm + end]["accuracy"]["mean"] if arm + end in rows else np.nan for end in ends]
            for arm in arms
        ]
    )
    figure = Figure(figsize=(2.5 + 0.6 * len(ends), 1.8 + 0.3 * len(arms)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(means, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (row, column), mean in np.ndenumerate(means):
        if np.isfinite(mean):
            ink = "white" if mean < 0.6 else "black"
            axes.text(column, row, f"{mean:.2f}", ha="center", va="center", color=ink, size=7)
    axes.set_xticks(range(len(ends)), [no_formula(end) for end in ends.values()], rotation=60)
    axes.set_yticks(range(len(arms)), [no_formula(arm) for arm in arms])
    axes.set_title("Accuracy, means over seeds")
    return figure


def bytes_plot(rows: Rows) -> Figure:
    """Accuracy against all that travelled, in megabytes on a logarithmic axis."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for arm, row in rows.items():
        megabytes = row["bytes_total"] / 1e6
        _dot(axes, megabytes, row["accuracy"]["mean"], row, axis="y")
        axes.annotate(
            no_formula(arm),
            (megabytes, row["accuracy"]["mean"]),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize="small",
        )
    # Linear near zero: training without a federation sends nothing.
    axes.set_xscale("symlog", linthresh=0.1)
    most = max(row["bytes_total"] for row in rows.values()) / 1e6
    axes.set_xlim(0, max(1.0, 3 * most))  # with room for the last name
    axes.set(xlabel="megabytes of the run, both ways", ylabel="accuracy")
    axes.grid(alpha=0.3)
    return figure


def _dot(axes: Any, x: float, y: float, row: Mapping[str, Any], axis: str) -> None:
    found, mean = row["accuracy"], row["accuracy"]["mean"]
    ends = None
    if found["ci95"] is not None:
        ends = [[mean - found["low"]], [found["high"] - mean]]
    colour = "tab:orange" if row["personal"] else "tab:blue"  # other figures, see the table
    axes.errorbar(x, y, **{f"{axis}err": ends}, fmt="o", color=colour, capsize=3)
