"""The order of a grid's runs: tuning first, then the seeds at the chosen rate, several at once."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from pydantic import TypeAdapter, ValidationError

from fedclip import files
from fedclip.errors import UsageError
from fedclip.experiment.bench.plan import Cell, Plan
from fedclip.experiment.bench.runner import Failed, Finished, Outcome, RunCell

USUAL_RUN_BYTES = 1.5e9
"""What a run is taken to need before the first one has been measured."""


class Watcher:
    """Hears of a grid's events and shows nothing."""

    def begin(self, total: int) -> None:
        """So many runs are planned."""

    def done(self, outcome: Outcome, running: int, slots: int) -> None:
        """A run came to its end, well or not; so many others are at work."""

    def chosen(self, choice: Choice) -> None:
        """An arm's learning rate is settled."""

    def refused(self, arm: str, reason: str, cells: int) -> None:
        """An arm cannot be compared; so many planned runs fall away."""


@dataclass(frozen=True)
class Choice:
    """An arm's learning rate, and how it came about.

    `validation` holds each rate tried with its validation accuracy, None where training diverged.
    `edge` is `lowest` or `highest` where the best rate is the list's last: a better one may lie
    beyond.
    """

    arm: str
    rate: float | None
    edge: str | None = None
    validation: dict[str, float | None] = field(default_factory=dict)
    cells: list[str] = field(default_factory=list)


_CHOICES = TypeAdapter(dict[str, Choice])


@dataclass
class Results:
    """What a grid gave: finished runs, choices of rates, and what went wrong, by arm."""

    finished: list[Finished] = field(default_factory=list)
    choices: dict[str, Choice] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)

    def of(self, arm: str) -> dict[int, Finished]:
        """An arm's runs that count, by seed."""
        own = {f.cell.seed: f for f in self.finished if f.cell.arm == arm and not f.cell.tuning}
        return dict(sorted(own.items()))

    def fail(self, arm: str, reason: str) -> None:
        """Notes what went wrong with an arm."""
        self.failures.setdefault(arm, []).append(reason)


def run_grid(
    plan: Plan,
    run_cell: RunCell,
    work: Path,
    *,
    jobs: int | None = None,
    watcher: Watcher | None = None,
    stop: Callable[[], None] = lambda: None,
) -> Results:
    """Runs what a plan asks for, `jobs` cells at a time (None: as the machine allows).

    An arm's failure does not stop the others. The rates chosen are kept in `work/tuning.json` and
    hold for later calls. `stop` ends what is running when the grid itself is stopped.
    """
    watcher, results = watcher or Watcher(), Results()
    kept = _kept_choices(work)
    pending: deque[Cell] = deque()
    tuned: dict[str, list[Outcome]] = {}
    for arm in plan.arms:
        problem = plan.problem(arm)
        cells = plan.tuning_cells(arm)
        if problem:
            results.fail(arm, problem)
            watcher.refused(arm, problem, 0)
        elif not cells:
            _settle(Choice(arm, plan.rates(arm)[0]), plan, results, pending, watcher)
        elif arm in kept and _fits(kept[arm], plan.rates(arm), cells):
            _settle(kept[arm], plan, results, pending, watcher)
        else:
            tuned[arm] = []
            pending.extendleft(reversed(cells))  # tuning goes first: more depends on it
    watcher.begin(len(pending) + len(tuned) * len(plan.seeds))

    for outcome, running, slots in _carried_out(pending, run_cell, jobs, stop):
        cell = outcome.cell
        watcher.done(outcome, running, slots)
        if isinstance(outcome, Finished):
            results.finished.append(outcome)
        elif not (cell.tuning and outcome.diverged):
            results.fail(cell.arm, f"{cell}: {outcome.reason}")
        if cell.tuning:
            tuned[cell.arm].append(outcome)
            if len(tuned[cell.arm]) == len(plan.tuning_cells(cell.arm)):
                choice = choose(cell.arm, tuned[cell.arm])
                if isinstance(choice, Choice):
                    kept[cell.arm] = choice
                    _keep(work, kept)
                    _settle(choice, plan, results, pending, watcher)
                else:
                    results.fail(cell.arm, choice)
                    watcher.refused(cell.arm, choice, len(plan.seeds))
    return results


def choose(arm: str, outcomes: list[Outcome]) -> Choice | str:
    """The rate of the highest validation accuracy, the lower of equals; or why there is none.

    A diverged run rules its rate out. Any other failure leaves the choice open: a rate must not
    lose by an accident.
    """
    outcomes = sorted(outcomes, key=lambda outcome: outcome.cell.rate or 0.0)
    if any(isinstance(o, Failed) and not o.diverged for o in outcomes):
        return "no learning rate was chosen, because not all tuning runs came to their end"
    accuracies = {
        o.cell.rate: o.summary.get("validation_accuracy") if isinstance(o, Finished) else None
        for o in outcomes
    }
    known = {rate: value for rate, value in accuracies.items() if value is not None}
    if not known:
        if all(isinstance(o, Failed) for o in outcomes):
            return "training diverged at every learning rate; give the arm lower rates"
        return "there are no validation examples to choose by; raise data.validation_fraction"
    best = max(known, key=lambda rate: known[rate])  # the first of equals
    rates = list(accuracies)
    edge = {rates[0]: "lowest", rates[-1]: "highest"}.get(best) if len(rates) > 1 else None
    shown = {f"{rate:g}": value for rate, value in accuracies.items()}
    return Choice(arm, best, edge, shown, [o.cell.name for o in outcomes])


def slots_for(cores: int, free_bytes: float, run_bytes: float) -> int:
    """How many runs go on at once: one a core, as far as memory reaches, and never none."""
    return max(1, min(cores, math.floor(free_bytes / run_bytes)))


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _carried_out(
    pending: deque[Cell], run_cell: RunCell, jobs: int | None, stop: Callable[[], None]
) -> Iterator[tuple[Outcome, int, int]]:
    """Outcomes as they come, with the numbers of runs at work and allowed.

    The consumer may add to `pending` between two of them.
    """
    free, peak = psutil.virtual_memory().available, 0
    cores = usable_cores()
    running: set[Future[Outcome]] = set()
    with ThreadPoolExecutor(jobs or cores) as pool:
        try:
            while pending or running:
                slots = jobs or slots_for(cores, free, peak or USUAL_RUN_BYTES)
                while pending and len(running) < slots:
                    running.add(pool.submit(run_cell, pending.popleft()))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for number, future in enumerate(done, start=1):
                    outcome = future.result()
                    if isinstance(outcome, Finished):
                        peak = max(peak, outcome.measured.get("peak_memory_bytes") or 0)
                    yield outcome, len(running) + len(done) - number, slots
        except BaseException:  # Ctrl-C: the pool waits for its threads, and they for processes
            stop()
            raise


def _settle(
    choice: Choice, plan: Plan, results: Results, pending: deque[Cell], watcher: Watcher
) -> None:
    results.choices[choice.arm] = choice
    watcher.chosen(choice)
    pending.extend(plan.cells(choice.arm, choice.rate))


def _kept_choices(work: Path) -> dict[str, Choice]:
    try:
        return _CHOICES.validate_python(files.read_json(work / "tuning.json"))
    except (UsageError, ValidationError):
        return {}  # the tuning runs are still there, and give the same choices again


def _fits(choice: Choice, rates: Sequence[float | None], cells: Sequence[Cell]) -> bool:
    """Whether a choice was made among these tuning runs."""
    return choice.rate in rates and choice.cells == [cell.name for cell in cells]


def _keep(work: Path, choices: dict[str, Choice]) -> None:
    text = json.dumps({arm: asdict(choice) for arm, choice in choices.items()}, indent=2)
    files.replace_file(work / "tuning.json", text.encode() + b"\n")
