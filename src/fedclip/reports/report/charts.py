"""Charts of a report: matplotlib's SVG in the page's colours, with text alternatives."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedclip.reports.curves import ACCURACY_AXIS
from fedclip.reports.report.record import RoundLine, TimeLine

_INK = "#010203"  # stands for the colour of the page's text, light or dark
_COLOURS = ("#2f7dc0", "#d9691e", "#2f9960", "#a35bb5", "#b8860b", "#5f7d8c")
_DASHES = ("-", "--", "-.", ":")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,  # no grid across bars
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "grid.alpha": 0.25,
    **{f"{name}.color": _INK for name in ("text", "xtick", "ytick", "grid")},
    **{f"axes.{name}color": _INK for name in ("edge", "label", "title")},
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_MOST_BARS = 100
_SIZE = (5.6, 3.3)  # inches, without a legend
_COLUMNS = 3  # of a legend


def accuracy_chart(rounds: Sequence[RoundLine], zero_shot: float | None) -> Markup:
    """Accuracy by round, the spread over clients, and the zero-shot line."""
    scored = [line for line in rounds if line.accuracy is not None]
    spread = [line for line in rounds if line.client_accuracy]

    def draw(axes: Axes) -> None:
        if scored:
            _line(axes, [(line.server_round, line.accuracy) for line in scored], "test set", 0)
        if spread:
            axes.fill_between(
                [line.server_round for line in spread],
                [line.client_accuracy.min for line in spread if line.client_accuracy],
                [line.client_accuracy.max for line in spread if line.client_accuracy],
                color=_COLOURS[0],
                alpha=0.2,
                linewidth=0,
                label="sites, lowest to highest",
            )
        if zero_shot is not None:
            axes.axhline(zero_shot, linestyle="--", color="#808890", label="zero-shot")
        axes.set_ylim(*ACCURACY_AXIS)

    last = f", at the end {scored[-1].accuracy:.3f}" if scored else ""
    return _svg(draw, f"Accuracy by round{last}", "round", "accuracy (share that is right)")


def loss_chart(rounds: Sequence[RoundLine]) -> Markup:
    """Training and test loss by round."""
    found = {
        "training": [(line.server_round, line.loss) for line in rounds if line.loss is not None],
        "test set": [
            (line.server_round, line.test_loss) for line in rounds if line.test_loss is not None
        ],
    }
    return lines_chart("Loss by round", "loss (nats)", found)


def lines_chart(
    title: str,
    unit: str,
    lines: Mapping[str, Sequence[tuple[int, float | None]]],
    most: float | None = None,
) -> Markup:
    """One line for each name, by round, on an axis from 0 to `most` where that is given."""

    def draw(axes: Axes) -> None:
        for number, (name, points) in enumerate(lines.items()):
            if points:
                _line(axes, points, name, number)
        if most is not None:
            axes.set_ylim(0, most)

    return _svg(draw, title, "round", unit)


def time_chart(times: Sequence[TimeLine]) -> Markup:
    """Seconds of each round: training, and all the rest."""

    def draw(axes: Axes) -> None:
        training = [min(line.training_seconds, line.seconds) for line in times]
        rest = [line.seconds - own for line, own in zip(times, training, strict=True)]
        at = [line.server_round for line in times]
        if len(at) > _MOST_BARS:
            axes.stackplot(at, training, rest, colors=_COLOURS[:2], labels=("training", "all else"))
            return
        axes.bar(at, training, color=_COLOURS[0], label="training")
        axes.bar(at, rest, bottom=training, color=_COLOURS[1], hatch="//", label="all else")

    return _svg(draw, "Time by round", "round (0: loading and first test)", "seconds")


def in_ink() -> AbstractContextManager[None]:
    """What is drawn within is drawn in the colours that `figure_svg` makes those of the page."""
    return matplotlib.rc_context(_STYLE)


def figure_svg(figure: Figure, title: str) -> Markup:
    """A figure as an SVG element that scales with the page and says what it is."""
    text = io.StringIO()
    # Names inside a picture begin with its title: no two pictures of a page share one.
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata=_NO_METADATA)
    svg = text.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2)
    told = f'<svg role="img" aria-label="{escape(title)}"'
    return Markup(svg.replace(_INK, "currentColor").replace("<svg", told, 1))


def _svg(draw: Callable[[Axes], None], title: str, x: str, y: str) -> Markup:
    with in_ink():
        figure = Figure()
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        draw(axes)
        axes.set_title(title.partition(",")[0], loc="left", fontsize=11)
        axes.set(xlabel=x, ylabel=y)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(axis="y")
        _place(figure, axes)
        return figure_svg(figure, title)


def _place(figure: Figure, axes: Axes) -> None:
    """Gives axes their room, and below them, where it hides no line, one to the legend."""
    names = len(axes.get_legend_handles_labels()[0])
    below = 0.24 * math.ceil(names / _COLUMNS)
    width, height = _SIZE[0], _SIZE[1] + below
    figure.set_size_inches(width, height)
    axes.set_position((0.14, (0.5 + below) / height, 0.84, 2.48 / height))
    if names:
        figure.legend(fontsize=9.5, loc="lower center", ncols=_COLUMNS, borderaxespad=0.2)


def _line(axes: Axes, points: Sequence[tuple[int, float | None]], name: str, number: int) -> None:
    x, y = zip(*points, strict=True)
    style = _DASHES[number // len(_COLOURS) % len(_DASHES)]
    mark = "o" if len(points) <= 30 else ""
    colour = _COLOURS[number % len(_COLOURS)]
    axes.plot(x, y, style, marker=mark, markersize=3.5, color=colour, label=name)
