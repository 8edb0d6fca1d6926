"""Plots of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCURACY_AXIS = (0, 1.05)
"""Room above 1, so that a line there does not lie on the frame."""


def curves_png(metrics: Sequence[Mapping[str, Any]], zero_shot: float | None) -> bytes:
    """Loss and accuracy by round as a PNG."""
    return png(curves(metrics, zero_shot))


def curves(metrics: Sequence[Mapping[str, Any]], zero_shot: float | None) -> Figure:
    """Loss and accuracy by round, with the clients' spread and the zero-shot line."""
    # Slow to import, and not needed before a run's end.
    from fedclip.reports.notebook_figure import NotebookFigure

    # A Figure of its own, without pyplot: no global state and no window system.
    # Fixed margins: a layout that is computed takes half a second.
    figure = NotebookFigure(figsize=(9, 4))
    figure.subplots_adjust(left=0.065, right=0.985, bottom=0.22, top=0.92, wspace=0.18)
    loss_axes, accuracy_axes = figure.subplots(1, 2)

    trained = [m for m in metrics if m.get("loss") is not None]
    loss_axes.plot(
        [m["server_round"] for m in trained], [m["loss"] for m in trained], label="training"
    )
    tested = [m for m in metrics if m.get("test_loss") is not None]
    loss_axes.plot(
        [m["server_round"] for m in tested], [m["test_loss"] for m in tested], label="test"
    )
    loss_axes.set(xlabel="round", ylabel="loss", title="Loss")

    scored = [m for m in metrics if m.get("accuracy") is not None]
    rounds = [m["server_round"] for m in scored]
    accuracy_axes.plot(rounds, [m["accuracy"] for m in scored], label="test set")
    spreads = [m for m in scored if m.get("client_accuracy")]
    if spreads:
        accuracy_axes.fill_between(
            [m["server_round"] for m in spreads],
            [m["client_accuracy"]["min"] for m in spreads],
            [m["client_accuracy"]["max"] for m in spreads],
            alpha=0.2,
            label="clients, lowest to highest",
        )
    if zero_shot is not None:
        accuracy_axes.axhline(zero_shot, linestyle="--", color="grey", label="zero-shot")
    accuracy_axes.set(xlabel="round", ylabel="accuracy", title="Accuracy", ylim=ACCURACY_AXIS)

    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.get_legend_handles_labels()[0]:
            # Below the axes, where it hides no line.
            place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
            axes.legend(fontsize="small", ncols=3, columnspacing=1, **place)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG."""
    return drawn(figure, "png")


def drawn(figure: Figure, form: str) -> bytes:
    """A figure as the bytes of a `png` or an `svg`, the same whenever it is drawn."""
    import matplotlib

    buffer = io.BytesIO()
    undated = {"Date": None} if form == "svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "fedclip"}):
        figure.savefig(buffer, format=form, dpi=120, metadata=undated)
    return buffer.getvalue()
