"""Tables and plots of a comparison, from the figures of its arms (`bench.figures.arm_figures`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedclip.reports.curves import png
from fedclip.reports.text import no_formula, plain

Rows = Mapping[str, Mapping[str, Any]]


def accuracy_table(rows: Rows, references: Sequence[str]) -> Table:
    """Accuracy of each arm with 95 % intervals, and differences on the same seeds."""
    table = _table("accuracy (mean ± half of the 95 % interval)")
    shown = [name for name in references if any(name in row["minus"] for row in rows.values())]
    extra = [k for k in _keys(rows) if k.startswith(("forgetting_", "metric_")) or k in _NAMES]
    _columns(table, "arm", "seeds", "accuracy", "over zero-shot", *(f"minus {n}" for n in shown))
    _columns(
        table,
        "lowest client",
        *(_NAMES.get(k, k.removeprefix("metric_").replace("_", " ")) for k in extra),
    )
    _columns(table, "rate")
    for arm, row in rows.items():
        rate = "-" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        table.add_row(
            plain(arm),
            str(len(row["runs"])),
            spread(row["accuracy"]),
            spread(row["gain"], sign=True),
            *(spread(row["minus"].get(name), sign=True) for name in shown),
            number(row["client_accuracy_min"], ".3f"),
            *(number(row.get(key), ".3f") for key in extra),
            rate + (" !" if row["learning_rate_edge"] else ""),
        )
    return table


def cost_table(rows: Rows) -> Table:
    """What each arm costs: traffic, time and memory."""
    table = _table("cost (means over seeds)")
    _columns(table, "arm", "MB up", "MB down", "MB in all", "seconds", "rounds to 95 %",
             "s to 95 %", "peak MB")  # fmt: skip
    for arm, row in rows.items():
        table.add_row(
            plain(arm),
            number(row["bytes_up_per_client_round"], ".3f", 1e6),
            number(row["bytes_down_per_client_round"], ".3f", 1e6),
            number(row["bytes_total"], ".1f", 1e6),
            number(row["seconds"], ".0f"),
            number(row["rounds_to_95"], ".1f"),
            number(row["seconds_to_95"], ".0f"),
            number(row["peak_memory_bytes"], ".0f", 1e6),
        )
    return table


def spread(value: Mapping[str, float | None] | None, sign: bool = False) -> str:
    """`0.812 ± 0.010`, of a mean with its interval."""
    if value is None:
        return "-"
    mean = f"{value['mean']:{'+' if sign else ''}.3f}"
    return mean if value["ci95"] is None else f"{mean} ± {value['ci95']:.3f}"


def number(value: float | None, form: str, unit: float = 1.0) -> str:
    """A number in some unit, or `-`."""
    return "-" if value is None else f"{value / unit:{form}}"


def accuracy_png(rows: Rows) -> bytes:
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
    return png(figure)


def bytes_png(rows: Rows) -> bytes:
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
    return png(figure)


_NAMES = {
    "base_accuracy": "base classes",
    "new_accuracy": "new classes",
    "harmonic_mean": "harmonic mean",
}


def _dot(axes: Any, x: float, y: float, row: Mapping[str, Any], axis: str) -> None:
    half = row["accuracy"]["ci95"] or 0.0
    axes.errorbar(x, y, **{f"{axis}err": half}, fmt="o", color="tab:blue", capsize=3)


def _keys(rows: Rows) -> list[str]:
    """Keys of all rows, each once, in order."""
    return list(dict.fromkeys(key for row in rows.values() for key in row))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(plain(name), justify="left" if name == "arm" else "right", overflow="fold")
