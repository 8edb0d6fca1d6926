"""What `fedclip bench` does: plan, run, tabulate, write."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedclip import files
from fedclip.config.ready import GRIDS, ready_named
from fedclip.data.source import some
from fedclip.errors import harmless
from fedclip.experiment.bench.digest import code_digests, input_digests
from fedclip.experiment.bench.display import Display, remark
from fedclip.experiment.bench.plan import Cell, Plan, make_plan, short
from fedclip.experiment.bench.result import code_of, result, write_result
from fedclip.experiment.bench.runner import ProcessRunner, RunCell
from fedclip.experiment.bench.schedule import Results, run_grid
from fedclip.experiment.bench.statistics import arm_figures
from fedclip.experiment.class_coverage import NOT_TESTED, NOT_VALIDATED, missing_in
from fedclip.experiment.folder import REPORT
from fedclip.reports.comparison import (
    Cells,
    Rows,
    accuracy_table,
    cost_table,
    crossed_table,
    tuning_table,
)
from fedclip.reports.comparison_plots import accuracy_plot, bytes_plot, crossed_plot
from fedclip.reports.curves import drawn
from fedclip.reports.report.compare import bench_page
from fedclip.reports.text import json_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Plot = Callable[[], Figure]

_WIDTH = 160
OTHER_CODE = (
    "warning: fedclip has changed since the first of these runs, and finished ones are not "
    "repeated; the result names the code that began. Take another --work to run all anew"
)
_CHECKOUT = Path(__file__).resolve().parents[4]


def bench(
    grid: Path,
    work: Path,
    *,
    jobs: int | None = None,
    full: bool = False,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    dry_run: bool = False,
    as_json: bool = False,
    result_file: Path | None = None,
    run_cell: RunCell | None = None,
) -> int:
    """Runs a grid in the folder `work` and prints its tables; gives the exit code.

    Finished runs are read, started ones are resumed. `run_cell` carries out one cell, by default in
    a process of its own.
    """
    plan = make_plan(grid, full=full, only=only, seeds=seeds)
    runner = ProcessRunner(plan.config, work / "runs")
    if dry_run:
        return _list_runs(plan, runner)
    (work / "runs").mkdir(parents=True, exist_ok=True)
    made_by = code_of(work)
    with Display() as display:
        try:
            results = run_grid(
                plan, run_cell or runner, work, jobs=jobs, watcher=display, stop=runner.stop
            )
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            raise SystemExit(130) from None
    rows = arm_figures(plan, results)
    figures, details = _for_the_file(grid, plan, results, rows)
    for path in dict.fromkeys([work / "result.json", *([result_file] if result_file else [])]):
        write_result(path, f"bench_{grid.stem}", figures, details, made_by)
    by_name, plots = _tables(plan, rows), _plots(plan, rows)
    tables = list(by_name.values())
    if rows:
        _write(work, by_name, {name: plot for name, (_, plot) in plots.items()})
        text = bench_page(grid.stem, tables, dict(plots.values()))
        files.replace_file(work / REPORT, text.encode())
    if as_json:
        whole = result(f"bench_{grid.stem}", figures, details, made_by)
        print(json_text(whole))
    elif rows:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=_WIDTH)  # a file has room for a row
        for table in tables:
            console.print(table.rich())
    _tell(results, rows, work, result_file, made_by)
    return 1 if results.failures else 0


def find_grid(name: str) -> Path:
    """A grid file: one that is named, `configs/bench/<name>.yaml` here, or a ready one."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    file = Path("configs") / GRIDS / f"{name}.yaml"
    return file if file.is_file() else ready_named(f"{GRIDS}/{name}").path


def _tables(plan: Plan, rows: Rows) -> dict[str, Cells]:
    """The tables by the name of their files."""
    grid = plan.grid
    crossed = {"crossed": crossed_table(rows, *_crossed(plan))} if grid.over else {}
    return crossed | {
        "accuracy": accuracy_table(rows, grid.reference),
        "cost": cost_table(rows),
        "tuning": tuning_table(rows),
    }


def _plots(plan: Plan, rows: Rows) -> Mapping[str, tuple[str, Plot]]:
    """The plots by the name of their files, with their titles."""
    crossed = ("Accuracy, arms by factors", partial(crossed_plot, rows, *_crossed(plan)))
    return ({"crossed": crossed} if plan.grid.over else {}) | {
        "accuracy": ("Accuracy by arm", partial(accuracy_plot, rows)),
        "bytes": ("Accuracy against megabytes", partial(bytes_plot, rows)),
    }


def _crossed(plan: Plan) -> tuple[list[str], dict[str, str]]:
    """Arms, and combinations of factors by the end of their arms' names."""
    over = plan.grid.over
    short = f"{next(iter(over), '').rpartition('.')[2]}-" if len(over) == 1 else ""
    ends = {end: end.removeprefix(".").removeprefix(short) for end in plan.grid.combinations()}
    return list(plan.grid.arms), ends


def _write(work: Path, tables: dict[str, Cells], plots: dict[str, Plot]) -> None:
    """Every table as Markdown, CSV and LaTeX, and the plots."""
    for name, table in tables.items():
        texts = {"md": table.markdown(), "csv": table.csv(), "tex": table.latex()}
        for form, text in texts.items():
            files.replace_file(work / f"{name}.{form}", text.encode())
    for name, plot in plots.items():
        figure = plot()
        for form in ("png", "svg"):
            files.replace_file(work / f"{name}.{form}", drawn(figure, form))


def _list_runs(plan: Plan, runner: ProcessRunner) -> int:
    """Prints what would be run first, and how much may follow."""
    refused = 0
    for arm, planned in plan.arms.items():
        problem = plan.problem(arm)
        if problem:
            refused = 1
            print(harmless(f"{arm}: left out: {problem}"))
            continue
        first = plan.cells(arm, planned.first_values)
        if planned.tuned:
            values = [
                planned.first_values | {planned.tuned[0]: v}
                for v in planned.knobs[planned.tuned[0]]
            ]
            first = [cell for one in values for cell in plan.tuning_cells(arm, one)]
        for cell in first:
            print(harmless(f"{cell}: {_command(plan, cell)}{_state(runner, cell)}"))
        if planned.tuned:
            seeds, knobs = ", ".join(map(str, plan.seeds)), ", ".join(map(short, planned.tuned))
            budget = plan.grid.tuning.budget
            print(f"{arm}: {budget} values of each of {knobs}, then seeds {seeds} at the best")
    runs = sum(plan.most_runs(arm) for arm in plan.arms)
    print(f"{runs} runs of {len(plan.arms)} arms at most")
    return refused


def _command(plan: Plan, cell: Cell) -> str:
    return " ".join(["fedclip run", str(plan.config), *cell.overrides])


def _state(runner: ProcessRunner, cell: Cell) -> str:
    return "  (finished)" if runner.is_finished(cell) else ""


def _for_the_file(
    grid: Path, plan: Plan, results: Results, rows: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flat figures by key, and the details that explain them."""
    figures: dict[str, Any] = {}
    for arm, row in rows.items():
        figures[f"accuracy_{arm}"] = row["accuracy"]["mean"]
        figures[f"bytes_total_{arm}"] = row["bytes_total"]
        figures[f"seconds_{arm}"] = row["seconds"]
        for reference, difference in row["minus"].items():
            figures[f"accuracy_{arm}_minus_{reference}"] = difference["mean"]
    return figures, {
        "command": f"fedclip bench {grid.stem}{' --full' if plan.full else ''}",
        "inputs": input_digests([grid, plan.config], _CHECKOUT),
        "grid": plan.grid.model_dump(mode="json"),
        "configuration": plan.base,
        "arms": rows,
        "failures": results.failures,
    }


def _tell(
    results: Results,
    rows: dict[str, dict[str, Any]],
    work: Path,
    result_file: Path | None,
    made_by: dict[str, Any],
) -> None:
    """Says on standard error what the tables do not."""
    lines = [] if made_by["code"] == code_digests() else [OTHER_CODE]
    lines += [
        f"! {arm}: {short(key)} {knob.value:g}{remark(knob)}"
        for arm, choice in results.choices.items()
        for key, knob in choice.knobs.items()
        if knob.edge or knob.ties
    ]
    lines += _gaps(results)
    lines += [
        f"failed: {arm}: {reason}" for arm, found in results.failures.items() for reason in found
    ]
    written = result_file or work / "result.json"
    lines.append(f"written to {written}" + (f", tables and plots in {work}" if rows else ""))
    print(harmless("\n".join(lines)), file=sys.stderr)


def _gaps(results: Results) -> list[str]:
    """Warnings of classes without a test image, or without one to tune by, each said once."""
    found: dict[str, list[str]] = {}
    for run in results.finished:
        kinds = {} if run.cell.tuning else {"test": NOT_TESTED}
        chosen = run.summary.get("best") or run.summary.get("stopped_by")
        if run.cell.tuning or chosen:  # by validation
            kinds["validation"] = NOT_VALIDATED
        for kind, key in kinds.items():
            if names := missing_in(run.summary, key):
                what = f"{len(names)} classes have no {kind} image: {some(names)}"
                found.setdefault(what, []).append(str(run.cell))
    return [f"warning: {what} (in {some(cells, 3)})" for what, cells in found.items()]
