"""Tables of a comparison, from the figures of its arms (`bench.statistics.arm_figures`)."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from tabulate import tabulate

from fedclip.reports.text import plain

Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Cells:
    """A table as text: the one source of what is printed and of every file."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in self.columns:
            table.add_column(
                plain(name), justify="left" if name == "arm" else "right", overflow="fold"
            )
        for row in self.rows:
            table.add_row(*map(plain, row))
        return table

    def markdown(self) -> str:
        """For a page."""
        cells = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        text = tabulate(cells, self.columns, tablefmt="github", disable_numparse=True)
        return f"{self.title}\n\n{text}\n"

    def latex(self) -> str:
        """For a paper, with the rules of booktabs."""
        text = tabulate(self.rows, self.columns, tablefmt="latex_booktabs", disable_numparse=True)
        return f"% {self.title}\n{text.replace('±', chr(36) + chr(92) + 'pm' + chr(36))}\n"

    def csv(self) -> str:
        """For a spreadsheet or a program."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()


def accuracy_table(rows: Rows, references: Sequence[str]) -> Cells:
    """Accuracy of each arm with 95 % intervals, and differences on the same seeds.

    A shared model's accuracy and that of the clients' personalised models are different figures,
    in columns of their own.
    """
    shown = [name for name in references if any(name in row["minus"] for row in rows.values())]
    extra = [k for k in _keys(rows) if k.startswith(("forgetting_", "metric_")) or k in _NAMES]
    personal = {row["personal"] for row in rows.values()}
    knobs = list(dict.fromkeys(key for row in rows.values() for key in row["tuning"]))
    columns = ["arm", "seeds"]
    columns += [{False: "accuracy", True: "personalised"}[kind] for kind in sorted(personal)]
    columns += ["over zero-shot"]
    for name in shown:
        columns += [f"minus {name}", "p (Holm)", "verdict"]
    columns += ["lowest client", "lowest 10 %"]
    columns += [_NAMES.get(k, k.removeprefix("metric_").replace("_", " ")) for k in extra]
    columns += [_knob_name(key) for key in knobs]
    found = []
    for arm, row in rows.items():
        cells = [arm, str(len(row["runs"]))]
        cells += [
            spread(row["accuracy"]) if row["personal"] == kind else "-" for kind in sorted(personal)
        ]
        cells += [spread(row["gain"], sign=True)]
        for name in shown:
            minus = row["minus"].get(name)
            cells += [spread(minus, sign=True), *_said(minus)]
        cells += [number(row[f"client_accuracy_{k}"], ".3f") for k in ("min", "worst_tenth")]
        cells += [number(row.get(key), ".3f") for key in extra]
        cells += [_chosen(row["tuning"].get(key)) for key in knobs]
        found.append(cells)
    return Cells("Accuracy (mean over seeds, 95 % interval; ! at an edge, ~ ties)", columns, found)


def crossed_table(rows: Rows, arms: Sequence[str], ends: Mapping[str, str]) -> Cells:
    """Accuracy of each arm at each combination of a grid's factors, whose names end its arms'."""
    found = [
        [arm, *(number(_mean_of(rows.get(arm + end)), ".3f") for end in ends)]
        for arm in arms
        if any(arm + end in rows for end in ends)
    ]
    return Cells(
        "Accuracy of arms at each factor (means over seeds)", ["arm", *ends.values()], found
    )


def cost_table(rows: Rows) -> Cells:
    """What each arm costs: traffic, time and memory, and how soon it has 95 % of its gain."""
    columns = ["arm", "MB up", "MB down", "MB in all", "seconds", "rounds to 95 %", "s to 95 %",
               "MB to 95 %", "peak MB", "tuning runs"]  # fmt: skip
    found = [
        [
            arm,
            number(row["bytes_up_per_client_round"], ".3f", 1e6),
            number(row["bytes_down_per_client_round"], ".3f", 1e6),
            number(row["bytes_total"], ".1f", 1e6),
            number(row["seconds"], ".0f"),
            number(row["rounds_to_95"], ".1f"),
            number(row["seconds_to_95"], ".0f"),
            number(row["bytes_to_95"], ".1f", 1e6),
            number(row["peak_memory_bytes"], ".0f", 1e6),
            str(row["tuning_runs"]),
        ]
        for arm, row in rows.items()
    ]
    return Cells("Cost (means over seeds; 95 % of the gain over the start)", columns, found)


def tuning_table(rows: Rows) -> Cells:
    """Every value that was tried, with its mean validation loss: a reader sees equal rates too."""
    found = []
    for arm, row in rows.items():
        for key, knob in row["tuning"].items():
            for value, loss in knob["losses"].items():
                marks = ["chosen"] if float(value) == knob["value"] else []
                marks += ["tie"] if float(value) in knob["ties"] else []
                marks += (
                    [f"{knob['edge']} tried"] if marks[:1] == ["chosen"] and knob["edge"] else []
                )
                shown = "diverged" if loss is None else f"{loss:.4f}"
                found.append([arm, key, value, shown, ", ".join(marks)])
    return Cells(
        "Tuning (mean validation loss over the tuning seeds)",
        ["arm", "knob", "value", "validation loss", ""],
        found,
    )


def spread(value: Mapping[str, float | None] | None, sign: bool = False) -> str:
    """`0.812 ± 0.010`, of a mean with its interval; `0.99 [0.97, 1.00]` where it is cut."""
    if value is None:
        return "-"
    mean, low, high = value["mean"], value["low"], value["high"]
    shown = f"{mean:{'+' if sign else ''}.3f}"
    if mean is None or low is None or high is None:
        return shown
    if abs((high - mean) - (mean - low)) > 1e-9:
        return f"{shown} [{low:.3f}, {high:.3f}]"
    return f"{shown} ± {value['ci95']:.3f}"


def _mean_of(row: Mapping[str, Any] | None) -> float | None:
    return None if row is None else row["accuracy"]["mean"]


def number(value: float | None, form: str, unit: float = 1.0) -> str:
    """A number in some unit, or `-`."""
    return "-" if value is None else f"{value / unit:{form}}"


_NAMES = {
    "base_accuracy": "base classes",
    "new_accuracy": "new classes",
    "harmonic_mean": "harmonic mean",
    "backdoor_success": "backdoor",
}


def _said(minus: Mapping[str, Any] | None) -> tuple[str, str]:
    """The corrected p of a difference, and what may be said of it."""
    if minus is None:
        return "-", "-"
    if minus["excluded"] is not None:
        return "-", "no claim"
    p = minus["p_holm"]
    shown = "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"
    return shown, minus["verdict"] or "-"


def _chosen(knob: Mapping[str, Any] | None) -> str:
    if knob is None:
        return "-"
    return f"{knob['value']:g}" + (" !" if knob["edge"] else "") + (" ~" if knob["ties"] else "")


def _knob_name(key: str) -> str:
    return "rate" if key == "client.learning_rate" else key.removeprefix("federation.")


def _keys(rows: Rows) -> list[str]:
    """Keys of all rows, each once, in order."""
    return list(dict.fromkeys(key for row in rows.values() for key in row))
