"""The order of a grid's runs: tuning first, then the seeds at the chosen values."""

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

from fedclip import files
from fedclip.experiment.bench.plan import Cell, Plan
from fedclip.experiment.bench.runner import Finished, Outcome, RunCell
from fedclip.experiment.bench.tuning import Choice, Losses, NoneConverged, Values, search

USUAL_RUN_BYTES = 1.5e9
"""What a run is taken to need before the first one has been measured."""


class Watcher:
    """Observer of a grid's events; this base class ignores them."""

    def begin(self, total: int) -> None:
        """So many runs are planned, at most."""

    def started(self, cell: Cell) -> None:
        """A run begins, goes on, or is read."""

    def done(self, outcome: Outcome, running: int, slots: int) -> None:
        """A run came to its end, well or not; so many others are at work."""

    def chosen(self, arm: str, choice: Choice) -> None:
        """An arm's hyperparameters are settled."""

    def refused(self, arm: str, reason: str, cells: int) -> None:
        """An arm cannot be compared; so many planned runs fall away."""


@dataclass
class Results:
    """What a grid gave: finished runs, choices of values, and what went wrong, by arm."""

    finished: list[Finished] = field(default_factory=list)
    choices: dict[str, Choice] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)

    def of(self, arm: str) -> dict[int, Finished]:
        """An arm's runs that count, by seed."""
        own = {f.cell.seed: f for f in self.finished if f.cell.arm == arm and not f.cell.tuning}
        return dict(sorted(own.items()))

    def tuning_runs(self, arm: str) -> int:
        """How many runs chose an arm's values."""
        return sum(f.cell.arm == arm and f.cell.tuning for f in self.finished)

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

    An arm's failure does not stop the others. The same finished runs lead to the same choices;
    `work/tuning.json` tells them. `stop` ends what is running when the grid itself is stopped.
    """
    watcher, results = watcher or Watcher(), Results()
    pending: deque[Cell] = deque()
    searches: dict[str, _ArmSearch] = {}
    for arm in plan.arms:
        if problem := plan.problem(arm):
            results.fail(arm, problem)
            watcher.refused(arm, problem, 0)
        else:
            searches[arm] = _ArmSearch(plan, arm)
    watcher.begin(sum(plan.most_runs(arm) for arm in searches))
    for arm, searching in searches.items():
        _go_on(searching.next_cells(), arm, plan, results, pending, watcher)

    for outcome, running, slots in _carried_out(pending, run_cell, jobs, stop, watcher):
        cell = outcome.cell
        watcher.done(outcome, running, slots)
        if isinstance(outcome, Finished):
            results.finished.append(outcome)
        elif not (cell.tuning and outcome.diverged):
            results.fail(cell.arm, f"{cell}: {outcome.reason}")
        if cell.tuning:
            found = searches[cell.arm].take(outcome)
            _go_on(found, cell.arm, plan, results, pending, watcher)
            _tell_choices(work, results)
    return results


class _ArmSearch:
    """An arm's search, fed with outcomes as they come."""

    def __init__(self, plan: Plan, arm: str) -> None:
        self._plan, self._arm = plan, arm
        self._search = search(
            plan.arms[arm].knobs,
            plan.grid.tuning.budget,
            lambda values: plan.problem(arm, values) is None,
        )
        self._asked: list[list[Cell]] = []  # a list for each choice of values
        self._outcomes: dict[str, Outcome] = {}

    def next_cells(self, losses: Sequence[Losses] | None = None) -> list[Cell] | Choice | str:
        """The cells to run next; the choice where all are known, or why there is none."""
        try:
            wanted: list[Values] = (
                next(self._search) if losses is None else self._search.send(list(losses))
            )
        except StopIteration as end:
            choice: Choice = end.value
            return choice
        except NoneConverged as error:
            return str(error)
        self._asked = [self._plan.tuning_cells(self._arm, values) for values in wanted]
        self._outcomes = {}
        return [cell for cells in self._asked for cell in cells]

    def take(self, outcome: Outcome) -> list[Cell] | Choice | str:
        """Takes an outcome in; what follows from it, or no cells while others are at work.

        A diverged run rules its values out. Any other failure leaves the choice open: a value must
        not lose by an accident.
        """
        self._outcomes[outcome.cell.name] = outcome
        names = [cell.name for cells in self._asked for cell in cells]
        if not all(name in self._outcomes for name in names):
            return []
        losses = []
        for cells in self._asked:
            own = [self._outcomes[cell.name] for cell in cells]
            if any(not isinstance(o, Finished) and not o.diverged for o in own):
                return "nothing was chosen, because not all tuning runs came to their end"
            if any(isinstance(o, Finished) and _loss(o) is None for o in own):
                return (
                    "there are no validation examples to choose by; raise data.validation_fraction"
                )
            losses.append([_loss(o) if isinstance(o, Finished) else None for o in own])
        return self.next_cells(losses)


def _loss(run: Finished) -> float | None:
    """The run's validation loss; one that is not finite is infinitely bad."""
    loss = run.summary.get("validation_loss")
    return loss if loss is None or math.isfinite(loss) else math.inf


def _go_on(
    found: list[Cell] | Choice | str,
    arm: str,
    plan: Plan,
    results: Results,
    pending: deque[Cell],
    watcher: Watcher,
) -> None:
    """Queues what comes next of an arm: tuning goes first, as more depends on it."""
    if isinstance(found, list):
        pending.extendleft(reversed(found))
    elif isinstance(found, str):
        results.fail(arm, found)
        watcher.refused(arm, found, len(plan.seeds))
    else:
        results.choices[arm] = found
        watcher.chosen(arm, found)
        pending.extend(plan.cells(arm, found.values))


def slots_for(cores: int, free_bytes: float, run_bytes: float) -> int:
    """How many runs go on at once: one a core, as far as memory reaches, and never none."""
    return max(1, min(cores, math.floor(free_bytes / run_bytes)))


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _carried_out(
    pending: deque[Cell],
    run_cell: RunCell,
    jobs: int | None,
    stop: Callable[[], None],
    watcher: Watcher,
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
                    cell = pending.popleft()
                    watcher.started(cell)
                    running.add(pool.submit(run_cell, cell))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for number, future in enumerate(done, start=1):
                    outcome = future.result()
                    if isinstance(outcome, Finished):
                        peak = max(peak, outcome.measured.get("peak_memory_bytes") or 0)
                    yield outcome, len(running) + len(done) - number, slots
        except BaseException:  # Ctrl-C: the pool waits for its threads, and they for processes
            stop()
            raise


def _tell_choices(work: Path, results: Results) -> None:
    text = json.dumps({arm: asdict(choice) for arm, choice in results.choices.items()}, indent=2)
    files.replace_file(work / "tuning.json", text.encode() + b"\n")
