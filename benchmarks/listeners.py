"""What a run's listeners cost: progress on a terminal and in a pipe, a tracker, the rounds' files.

The processor time inside their calls, and in the threads of theirs, over that of the rounds: so
other programs on the machine change little. Runs with and without listeners take turns.

    python -m benchmarks.listeners     about three minutes on 2 cores
"""

from __future__ import annotations

import os
import pty
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

import fedclip
from benchmarks.common import ROOT, write_result
from fedclip.config.loading import load_config
from fedclip.experiment import run as run_module
from fedclip.experiment.checkpoint import Checkpoint
from fedclip.experiment.folder import RunFolder
from fedclip.reports.listener import Listener
from fedclip.reports.progress import make_progress

PAIRS = 5
EVENTS = ("start", "message", "images", "partition", "rounds", "steps", "client", "round", "stop",
          "finish", "__enter__", "__exit__")  # fmt: skip
IMPORTS = "import time; t = time.process_time(); import {}; print(time.process_time() - t)"
TRACKER = "tensorboard" if find_spec("tensorboard") else None


class Timed(Listener):
    """A listener, the processor seconds of its calls in the rounds, and those of all the rounds."""

    def __init__(self, inner: Listener) -> None:
        """Takes the listener."""
        self.inner, self.spent = inner, list[float]()
        self.began = self.ended = self.threads = 0.0


def timed(name: str, call: Callable[..., Any], spent: Callable[[Any], list[float]]) -> Any:
    """A method that notes the processor seconds of its thread."""

    def timing(self: Any, *given: Any) -> Any:
        if name == "rounds":
            self.began = time.process_time()
            self.spent.clear()
        started = time.thread_time()
        try:
            return call(self, *given)
        finally:
            spent(self).append(time.thread_time() - started)
            if name == "round":
                self.ended = time.process_time()
                self.threads = _threads()

    return timing


def _passed_on(name: str) -> Callable[..., Any]:
    def call(self: Timed, *given: Any) -> Any:
        found = getattr(self.inner, name)(*given)
        return self if name == "__enter__" else found

    return call


for event in EVENTS:
    setattr(Timed, event, timed(event, _passed_on(event), lambda self: self.spent))


def _threads() -> float:
    """Processor seconds of the threads that draw, and of those that track."""
    return sum(
        time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        for thread in threading.enumerate()
        if thread.ident and ("Refresh" in type(thread).__name__ or "tracker" in thread.name)
    )


def main() -> None:
    """Runs all pairs, times the imports, and writes the result file."""
    files = list[float]()
    for owner, name in ((RunFolder, "append_metrics"), (RunFolder, "append_timing"),
                        (Checkpoint, "save")):  # fmt: skip
        setattr(owner, name, timed("", getattr(owner, name), lambda _: files))
    rows = [_both(number, files) for number in range(PAIRS)]
    kinds = {key: [row[key] for row in rows] for key in rows[0]}
    middle = {key: statistics.median(values) for key, values in kinds.items()}
    report = _import_seconds("fedclip.experiment.run", "fedclip.experiment.report")
    tracker = "fedclip.reports.trackers.tensorboard, tensorboard.summary.writer.event_file_writer"
    figures = {
        "listeners_share": max(middle["terminal_share"], middle["pipe_share"]),
        **middle,
        "import_report_seconds": report,
        "pairs": PAIRS,
    }
    if TRACKER:
        figures["import_tensorboard_seconds"] = _import_seconds("fedclip.experiment.run", tracker)
    for key, value in figures.items():
        print(f"{key:32} {value:.4g}")
    write_result("listeners", figures, {"runs": kinds, "tracker": TRACKER})


def _both(number: int, files: list[float]) -> dict[str, float]:
    """A run without, one in a pipe and one on a terminal."""
    silent = _run(Listener(), None, files)
    reader, writer = os.pipe()
    pipe = _run_into(reader, writer, files)
    terminal = _run_into(*pty.openpty(), files)
    print(f"pair {number + 1}: {silent} {pipe} {terminal}", flush=True)
    return {
        "silent_rounds_seconds": silent["rounds"],
        "pipe_rounds_seconds": pipe["rounds"],
        "terminal_rounds_seconds": terminal["rounds"],
        "round_files_share": silent["files"] / silent["rounds"],
        "pipe_share": (pipe["listeners"] + pipe["files"]) / pipe["rounds"],
        "terminal_share": (terminal["listeners"] + terminal["files"]) / terminal["rounds"],
    }


def _run_into(reader: int, writer: int, files: list[float]) -> dict[str, float]:
    """A run whose progress goes into the writing end, while somebody reads."""

    def read() -> None:
        try:
            while os.read(reader, 65536):
                pass
        except OSError:  # a terminal whose other end is closed
            pass

    threading.Thread(target=read, daemon=True).start()
    with os.fdopen(writer, "w") as stream:
        return _run(make_progress(Console(file=stream, width=100)), TRACKER, files)


def _run(listener: Listener, tracker: str | None, files: list[float]) -> dict[str, float]:
    """Processor seconds of a run's rounds, of its listeners in them, and of writing their files."""
    tracking = f"tracking=[{tracker or ''}]"
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["federation.rounds=2", tracking])
    files.clear()
    heard, trackers = Timed(listener), list[Timed]()
    plain = run_module.tracked

    def tracked(*given: Any) -> Timed:
        trackers.append(Timed(plain(*given)))
        return trackers[-1]

    run_module.tracked = tracked  # type: ignore[assignment]
    try:
        with tempfile.TemporaryDirectory() as folder:
            fedclip.run(config, output=Path(folder) / "run", listener=heard)
    finally:
        run_module.tracked = plain
    calls = sum(heard.spent) + sum(trackers[0].spent)
    return {
        "rounds": heard.ended - heard.began,
        "listeners": calls + trackers[0].threads,  # the later one hears of the last round
        "files": sum(files),
    }


def _import_seconds(before: str, what: str) -> float:
    """Processor seconds of importing, after what every run imports: the median of three."""
    code = f"import {before}; {IMPORTS.format(what)}"
    found = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
        for _ in range(3)
    ]
    return statistics.median(found)


if __name__ == "__main__":
    main()
