"""What a comparison tells while it runs: a line for each run and choice, and the time left."""

from __future__ import annotations

from statistics import fmean

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fedclip.experiment.bench.plan import Cell, short
from fedclip.experiment.bench.runner import Finished, Outcome
from fedclip.experiment.bench.schedule import Watcher
from fedclip.experiment.bench.tuning import Choice, Knob
from fedclip.reports.progress import duration
from fedclip.reports.text import message


class Display(Watcher):
    """A line for each run that begins or ends, and a bar on a terminal."""

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
        self._seconds: dict[bool, list[float]] = {True: [], False: []}  # tuning runs are shorter

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

    def started(self, cell: Cell) -> None:
        """Says in a pipe that a run begins; on a terminal the bar shows that something goes on."""
        if not self._console.is_terminal:
            self._say(f"{cell}: begins")

    def done(self, outcome: Outcome, running: int, slots: int) -> None:
        """Prints the run's figures and how much is left."""
        self._done += 1
        if isinstance(outcome, Finished):
            summary = outcome.summary
            self._seconds[outcome.cell.tuning].append(summary["seconds"])
            loss = summary.get("validation_loss")
            words = f"accuracy {summary['accuracy']:.4f}"
            words += f"  validation loss {loss:.4f}" if loss is not None else ""
            words += f"  {summary['seconds']:.0f} s"
        else:
            words = ("diverged: " if outcome.diverged else "failed: ") + outcome.reason
        left = f"{running} running{self._left(slots)}"
        self._progress.update(self._task, advance=1, note=left)
        self._say(f"[{self._done}/{self._total}] {outcome.cell}: {words}  ({left})")

    def chosen(self, arm: str, choice: Choice) -> None:
        """Prints the values that tuning chose, with edges and ties."""
        for key, knob in choice.knobs.items():
            if knob.losses:
                self._say(f"{arm}: {short(key)} {knob.value:g}{remark(knob)}")

    def refused(self, arm: str, reason: str, cells: int) -> None:
        """Prints why an arm is left out."""
        self._total -= cells
        self._progress.update(self._task, total=self._total)
        self._say(f"{arm}: left out: {reason}")

    def _left(self, slots: int) -> str:
        """The time left, by what finished runs took; a run that was read counts as it once took."""
        known = [second for own in self._seconds.values() for second in own]
        if not known:
            return ""
        each = fmean(self._seconds[False] or known)
        return f", at most {duration((self._total - self._done) * each / slots)} left"

    def _say(self, text: str) -> None:
        self._console.print(message(text))


def remark(knob: Knob) -> str:
    """What a reader must know of a choice: an edge, ties."""
    words = ""
    if knob.edge:
        beyond = "lower" if knob.edge == "lowest" else "higher"
        words += f" is the {knob.edge} value tried; a {beyond} one may be better, so the arm takes "
        words += "part in no claim"
    if knob.ties:
        words += f"; {', '.join(f'{value:g}' for value in knob.ties)} not told apart from it"
    return words
