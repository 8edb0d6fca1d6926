"""What `fedclip bench` does: plan, run, tabulate, write."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fedclip import files
from fedclip.data.source import some
from fedclip.errors import UsageError, harmless
from fedclip.experiment.bench.plan import Cell, Plan, make_plan
from fedclip.experiment.bench.result import result, write_result
from fedclip.experiment.bench.runner import Finished, Outcome, ProcessRunner, RunCell
from fedclip.experiment.bench.schedule import Choice, Results, Watcher, run_grid
from fedclip.experiment.bench.statistics import arm_figures
from fedclip.experiment.coverage import NOT_TESTED, NOT_VALIDATED, missing_in
from fedclip.reports.comparison import accuracy_png, accuracy_table, bytes_png, cost_table
from fedclip.reports.text import json_text, message

_WIDTH = 160
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
    with Display() as display:
        try:
            results = run_grid(
                plan, run_cell or runner, work, jobs=jobs, watcher=display, stop=runner.stop
            )
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            raise SystemExit(130) from None
    rows = arm_figures(plan, results)
    figures, details = _for_the_file(grid.stem, plan, results, rows)
    for path in dict.fromkeys([work / "result.json", *([result_file] if result_file else [])]):
        write_result(path, f"bench_{grid.stem}", figures, details)
    if rows:
        files.replace_file(work / "accuracy.png", accuracy_png(rows))
        files.replace_file(work / "bytes.png", bytes_png(rows))
    if as_json:
        whole = result(f"bench_{grid.stem}", figures, details)
        print(json_text(whole))
    elif rows:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=_WIDTH)  # a file has room for a row
        console.print(accuracy_table(rows, plan.grid.reference))
        console.print(cost_table(rows))
    _tell(results, rows, work, result_file)
    return 1 if results.failures else 0


def find_grid(name: str) -> Path:
    """The grid file `configs/bench/<name>.yaml`, here or in the checkout that fedclip runs from."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    for root in (Path(), _CHECKOUT):
        file = root / "configs" / "bench" / f"{name}.yaml"
        if file.is_file():
            return file
    raise UsageError(
        f"there is no grid configs/bench/{name}.yaml here; name a file by --grid FILE, or work in "
        "a checkout of fedclip, which has the grids strategies and ranks"
    )


class Display(Watcher):
    """A line for each run that ends, and a bar on a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        """Writes to the console, by default standard error."""
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("runs"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("runs", total=0, note="")
        self._total = self._done = 0
        self._started = time.monotonic()

    def __enter__(self) -> Display:
        """Starts drawing."""
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stops drawing."""
        self._progress.stop()

    def begin(self, total: int) -> None:
        """Takes up the number of runs."""
        self._total = total
        self._progress.update(self._task, total=total)

    def done(self, outcome: Outcome, running: int, slots: int) -> None:
        """Prints the run's figures and how much is left."""
        self._done += 1
        if isinstance(outcome, Finished):
            summary = outcome.summary
            validation = summary.get("validation_accuracy")
            words = f"accuracy {summary['accuracy']:.4f}"
            words += f"  validation {validation:.4f}" if validation is not None else ""
            words += f"  {summary['seconds']:.0f} s"
        else:
            words = ("diverged: " if outcome.diverged else "failed: ") + outcome.reason
        left = f"{running} running, about {_duration(self._left())} left"
        self._progress.update(self._task, advance=1, note=left)
        self._say(f"[{self._done}/{self._total}] {outcome.cell}: {words}  ({left})")

    def chosen(self, choice: Choice) -> None:
        """Prints the rate where one was chosen."""
        if choice.validation:
            self._say(f"{choice.arm}: learning rate {choice.rate:g}{_edge(choice)}")

    def refused(self, arm: str, reason: str, cells: int) -> None:
        """Prints why an arm is left out."""
        self._total -= cells
        self._progress.update(self._task, total=self._total)
        self._say(f"{arm}: left out: {reason}")

    def _left(self) -> float:
        """Seconds, by the pace so far."""
        return (time.monotonic() - self._started) / self._done * (self._total - self._done)

    def _say(self, text: str) -> None:
        self._console.print(message(text))


def _list_runs(plan: Plan, runner: ProcessRunner) -> int:
    """Prints what would be run; seeds follow the rate that tuning chooses."""
    refused = 0
    for arm in plan.arms:
        problem = plan.problem(arm)
        if problem:
            refused = 1
            print(harmless(f"{arm}: left out: {problem}"))
            continue
        tuning, rates = plan.tuning_cells(arm), plan.rates(arm)
        known = [] if tuning else plan.cells(arm, rates[0])
        for cell in (*tuning, *known):
            print(harmless(f"{cell}: {_command(plan, cell)}{_state(runner, cell)}"))
        if tuning:
            seeds = ", ".join(map(str, plan.seeds))
            print(f"{arm}: then seeds {seeds} at the best rate of {_rates(rates)}")
    runs = sum(len(plan.tuning_cells(arm)) + len(plan.seeds) for arm in plan.arms)
    print(f"{runs} runs of {len(plan.arms)} arms")
    return refused


def _command(plan: Plan, cell: Cell) -> str:
    return " ".join(["fedclip run", str(plan.config), *cell.overrides])


def _state(runner: ProcessRunner, cell: Cell) -> str:
    return "  (finished)" if runner.is_finished(cell) else ""


def _rates(rates: Sequence[float | None]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates if rate is not None)


def _for_the_file(
    name: str, plan: Plan, results: Results, rows: dict[str, dict[str, Any]]
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
        "command": f"fedclip bench {name}{' --full' if plan.full else ''}",
        "grid": plan.grid.model_dump(mode="json"),
        "configuration": plan.base,
        "arms": rows,
        "failures": results.failures,
    }


def _tell(
    results: Results, rows: dict[str, dict[str, Any]], work: Path, result_file: Path | None
) -> None:
    """Says on standard error what the tables do not."""
    lines = [
        f"! {choice.arm}: {choice.rate:g}{_edge(choice)}"
        for choice in results.choices.values()
        if choice.edge
    ]
    lines += _gaps(results)
    lines += [
        f"failed: {arm}: {reason}" for arm, found in results.failures.items() for reason in found
    ]
    written = result_file or work / "result.json"
    lines.append(f"written to {written}" + (f" and {work}/*.png" if rows else ""))
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


def _edge(choice: Choice) -> str:
    if choice.edge is None:
        return ""
    beyond = "lower" if choice.edge == "lowest" else "higher"
    return f" is the {choice.edge} rate tried; a {beyond} one may be better"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 2:
        return f"{hours:.1f} h"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"
