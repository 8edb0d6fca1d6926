"""Run one cell: `fedclip run` in a subprocess, measured, resumable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from fedclip import files
from fedclip.errors import UsageError
from fedclip.experiment.bench.plan import Cell
from fedclip.experiment.folder import RunFolder
from fedclip.experiment.summary_file import read_summary
from fedclip.federated.update_checks import ADVICE

_LAST_LINES = 12
_STARTS = TypeAdapter(list[dict[str, int | float]])  # all that is measured of a start


@dataclass(frozen=True)
class Finished:
    """A cell's figures: what its run folder holds, and what was measured from outside.

    `measured` has `seconds`, `cpu_seconds`, `peak_memory_bytes` (None where the system does not
    say) and `starts`, all of them over every start of the run. `hits` says of each test image, in
    the order of the data set, whether the last round's model is right.
    """

    cell: Cell
    summary: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    timing: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    hits: list[int] | None = None


@dataclass(frozen=True)
class Failed:
    """A cell that has no figures; `diverged`: its loss was no number any more."""

    cell: Cell
    reason: str
    diverged: bool = False


Outcome = Finished | Failed
RunCell = Callable[[Cell], Outcome]


class ProcessRunner:
    """Carries cells out in processes of one thread each; safe to call from several threads."""

    def __init__(self, config: Path, folder: Path) -> None:
        """`config` is the configuration of all cells; their run folders lie in `folder`."""
        self._config = config
        self._folder = folder
        self._running: set[int] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def __call__(self, cell: Cell) -> Outcome:
        """Runs a cell, goes on with a started one, or reads a finished one."""
        run = RunFolder(self._folder / cell.name)
        if not run.is_finished():
            code, errors = self._execute(cell, run)
            if code:
                return Failed(cell, _reason(code, errors), diverged=_diverged(code, errors))
        return self.read(cell)

    def is_finished(self, cell: Cell) -> bool:
        """Whether the cell's run came to its end in an earlier call."""
        return RunFolder(self._folder / cell.name).is_finished()

    def read(self, cell: Cell) -> Outcome:
        """Reads a finished cell."""
        run = RunFolder(self._folder / cell.name)
        try:
            metrics = run.read_metrics()
            return Finished(
                cell,
                read_summary(run),
                metrics,
                run.read_timing(),
                _measured(self._record(cell)),
                _hits(run, metrics),
            )
        except UsageError as error:
            return Failed(cell, str(error))

    def stop(self) -> None:
        """Ends the processes; their runs keep the last finished round."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                os.kill(process, signal.SIGTERM)

    def _execute(self, cell: Cell, run: RunFolder) -> tuple[int, str]:
        new = [str(self._config), *cell.overrides, "--output", str(run.path)]
        arguments = ["--resume", str(run.path)] if run.is_run() else new
        started = time.perf_counter()
        with (self._folder / f"{cell.name}.log").open("w+b") as log:
            with self._lock:
                if self._stopped:
                    return -signal.SIGTERM, ""
                process = subprocess.Popen(
                    [sys.executable, "-m", "fedclip", "run", *arguments],
                    env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                )
                self._running.add(process.pid)
            code, usage = self._wait(process)
            log.seek(0)
            errors = log.read().decode(errors="replace")
        self._note(cell, {"seconds": time.perf_counter() - started, **usage, "exit_code": code})
        return code, errors

    def _wait(self, process: subprocess.Popen[bytes]) -> tuple[int, dict[str, Any]]:
        """Exit code and what the process took."""
        usage = {}
        if hasattr(os, "wait4"):  # not on Windows
            # Waited for without being reaped, so that `stop` never signals another process's id.
            if hasattr(os, "waitid"):
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            with self._lock:
                _, status, taken = os.wait4(process.pid, 0)
                self._running.discard(process.pid)
            process.returncode = os.waitstatus_to_exitcode(status)
            unit = 1 if sys.platform == "darwin" else 1024
            usage = {
                "peak_memory_bytes": taken.ru_maxrss * unit,
                "cpu_seconds": taken.ru_utime + taken.ru_stime,
            }
        else:
            process.wait()
            with self._lock:
                self._running.discard(process.pid)
        return process.returncode, usage

    def _record(self, cell: Cell) -> list[dict[str, Any]]:
        """What was measured of each start of a cell's run."""
        try:
            record = files.read_json(self._folder / f"{cell.name}.bench.json")
            return _STARTS.validate_python(record.get("starts"), strict=True)
        except (UsageError, ValidationError):
            return []

    def _note(self, cell: Cell, start: dict[str, Any]) -> None:
        record = {
            "arm": cell.arm,
            "seed": cell.seed,
            "values": dict(cell.values),
            "tuning": cell.tuning,
            "overrides": list(cell.overrides),
            "starts": [*self._record(cell), start],
        }
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        files.replace_file(self._folder / f"{cell.name}.bench.json", text.encode())


def _hits(run: RunFolder, metrics: list[dict[str, Any]]) -> list[int] | None:
    """Which test images are classified correctly at the end, where that was recorded."""
    last = metrics[-1] if metrics else {}
    if "test_hits" not in last:
        return None
    try:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(last["test_hits"]), dtype=np.uint8))
        return bits[: int(last["test_examples"])].tolist()
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UsageError(f"{run.path}: test_hits of its last line cannot be read") from None


def _measured(starts: list[dict[str, Any]]) -> dict[str, Any]:
    peaks = [s["peak_memory_bytes"] for s in starts if "peak_memory_bytes" in s]
    return {
        "seconds": sum(s.get("seconds", 0.0) for s in starts),
        "cpu_seconds": sum(s.get("cpu_seconds", 0.0) for s in starts),
        "peak_memory_bytes": max(peaks, default=None),
        "starts": len(starts),
    }


def _reason(code: int, errors: str) -> str:
    if code < 0:
        ended = f"ended by signal {signal.Signals(-code).name}"
        return f"{ended}: out of memory?" if -code == signal.SIGKILL else ended
    lines = [line for line in errors.strip().splitlines() if line.strip()]
    told = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    lines = lines[told[-1] :] if told else lines  # the message alone, without the progress
    return (
        "\n".join(lines[-_LAST_LINES:]).removeprefix("error: ")
        or f"exit code {code}, without a word"
    )


def _diverged(code: int, errors: str) -> bool:
    return code == 1 and ADVICE in errors
