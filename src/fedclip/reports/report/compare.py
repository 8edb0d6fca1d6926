"""The page of several runs, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from fedclip.reports.closing import number
from fedclip.reports.comparison import Cells
from fedclip.reports.curves import ACCURACY_AXIS
from fedclip.reports.progress import duration
from fedclip.reports.report import charts
from fedclip.reports.report.blocks import Cell, Charts, Facts, Section, Table, Text
from fedclip.reports.report.page import page
from fedclip.reports.report.record import RunRecord
from fedclip.reports.report.sections import (
    about,
    before_by_site,
    last_by_site,
    results,
)
from fedclip.reports.report.tables import MOST_SITES, gain_cells


def compare_page(runs: Sequence[RunRecord]) -> str:
    """A page of several runs; each is a letter in the charts."""
    named = {_letter(number): run for number, run in enumerate(runs)}
    return page(
        f"{len(runs)} runs side by side",
        "; ".join(f"{letter}: {run.name}" for letter, run in named.items()),
        [
            Section("Runs", [Facts([(_name(k, run), about(run)) for k, run in named.items()])]),
            Section("Results", [_results(named)]),
            Section("Rounds", [_curves(named)]),
            Section("What differs", [_differences(named)]),
            Section("Sites", _sites(named)),
            Section("Traffic and time", [_cost(named)]),
        ],
    )


def bench_page(
    name: str, tables: Sequence[Cells], plots: Mapping[str, Callable[[], Figure]]
) -> str:
    """The page of a bench: its tables, and its plots by title."""
    with charts.in_ink():
        drawn = [charts.figure_svg(plot(), title) for title, plot in plots.items()]
    shown = [Table(cells.title, cells.columns, cells.rows) for cells in tables if cells.rows]
    sections = [Section("Plots", [Charts(drawn)]), Section("Figures", shown)]
    return page(f"Bench {name}", "Arms compared on the same seeds and test set", sections)


def _letter(number: int) -> str:
    """A, B, ..., Z, AA, AB and so on."""
    return (_letter(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)


def _name(letter: str, run: RunRecord) -> str:
    return f"{letter}: {run.name}"


def _columns(first: str, named: Mapping[str, RunRecord]) -> list[str]:
    return [first, *(_name(letter, run) for letter, run in named.items())]


def _results(named: Mapping[str, RunRecord]) -> Table:
    found = {letter: dict(results(run)) for letter, run in named.items()}
    keys = dict.fromkeys(key for own in found.values() for key in own)
    rows = [[key, *(own.get(key, "-") for own in found.values())] for key in keys]
    return Table("Figures of each run", _columns("figure", named), rows)


def _curves(named: Mapping[str, RunRecord]) -> Charts:
    accuracy, loss = (
        {
            letter: [
                (line.server_round, value)
                for line in run.rounds
                if (value := getattr(line, key)) is not None
            ]
            for letter, run in named.items()
        }
        for key in ("accuracy", "loss")
    )
    right = "accuracy (share that is right)"
    return Charts(
        [
            charts.lines_chart("Accuracy by round", right, accuracy, most=ACCURACY_AXIS[1]),
            charts.lines_chart("Training loss by round", "loss (nats)", loss),
        ]
    )


def _differences(named: Mapping[str, RunRecord]) -> Table | Text:
    flat = {letter: dict(_flat(run.config)) for letter, run in named.items()}
    keys = dict.fromkeys(key for own in flat.values() for key in own)
    rows = [
        [key, *values]
        for key in keys
        if len(set(values := [own.get(key, "-") for own in flat.values()])) > 1
    ]
    if not rows:
        return Text("The configurations are the same.")
    return Table("Keys of the configuration that differ", _columns("key", named), rows)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)


def _sites(named: Mapping[str, RunRecord]) -> list[Table]:
    """Each site's last accuracy in every run, and its gains where these can be compared.

    A run by strategy `local` shows what each site reaches by training alone.
    """
    last = {letter: last_by_site(run) for letter, run in named.items()}
    sites = list(dict.fromkeys(site for own in last.values() for site in own))[:MOST_SITES]
    if not sites:
        return []
    rows = [[site, *(number(own.get(site)) for own in last.values())] for site in sites]
    tables = [Table("Accuracy on each site's own test images", _columns("site", named), rows)]
    alone = [k for k, run in named.items() if run.config["federation"]["strategy"] == "local"]
    for start, before in (
        ("zero-shot", {letter: before_by_site(run) for letter, run in named.items()}),
        *((f"training alone ({k})", dict.fromkeys(named, last[k])) for k in alone[:1]),
    ):
        others = [letter for letter in named if letter not in alone or start == "zero-shot"]
        gains: list[list[Cell | str]] = [
            [site, *(gain_cells(before[k].get(site), last[k].get(site))[2] for k in others)]
            for site in sites
        ]
        names = _columns("site", {k: named[k] for k in others})
        tables.append(Table(f"Gain of each site over {start}", names, gains))
    return tables


def _cost(named: Mapping[str, RunRecord]) -> Table:
    rows = {
        "sent by sites, MB": lambda run: f"{sum(r.bytes_up for r in run.rounds) / 1e6:,.1f}",
        "received by sites, MB": lambda run: f"{sum(r.bytes_down for r in run.rounds) / 1e6:,.1f}",
        "time": lambda run: duration(sum(t.seconds for t in run.times)) if run.times else "-",
        "training, s": lambda run: f"{sum(t.training_seconds for t in run.times):,.1f}",
    }
    cells = [[name, *(told(run) for run in named.values())] for name, told in rows.items()]
    return Table("What each run cost", _columns("cost", named), cells)
