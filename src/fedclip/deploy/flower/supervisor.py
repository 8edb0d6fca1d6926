"""A process that is kept alive: started, watched, started again after a wait, and stopped whole."""

from __future__ import annotations

import os
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

from fedclip.deploy.addresses import Address, answers, is_free
from fedclip.deploy.flower.commands import NODE_WINDOW, Command
from fedclip.deploy.flower.exit_reasons import Ending, explain
from fedclip.errors import FedclipError

MARK = "FEDCLIP_SUPERVISED"
LOOK_EVERY = 0.2
START_PATIENCE = 120.0
"""Seconds in which a process must have started."""
LARGEST_LOG = 20_000_000
PORT_PATIENCE = 20.0
"""Seconds until a process of a killed coordinator or site has noticed and left its port."""

Ready = Callable[[str], bool]
"""Whether a process does its work, asked with what it has written since it was started."""


class ProcessFailed(FedclipError):
    """A process that will not run until somebody mends what its message says."""


@dataclass(frozen=True)
class BackOff:
    """Seconds to wait before a process is started again: doubled each time, up to a most.

    After an end that may have left the process counted as online, at least `window`.
    """

    first: float = 1.0
    most: float = 60.0
    window: float = 0.0

    def wait(self, failures: int, hard: bool) -> float:
        """The wait after this number of failures in a row, the last of which was hard or not."""
        usual = min(self.first * 2.0 ** min(max(failures - 1, 0), 30), self.most)
        return max(usual, self.window) if hard else usual


FOR_NODES = BackOff(first=2.0, most=120.0, window=NODE_WINDOW + 2.0)
"""For a SuperNode with a key: Flower refuses it while it still counts as online."""


def joined(log: str) -> bool:
    """Whether a SuperNode has been admitted, by its log."""
    return "SuperNode ID:" in log


def listening(address: Address, authority: Path | None) -> Ready:
    """Whether a SuperLink answers at its address with its certificate."""
    return lambda log: answers(address.from_here, authority)


class Supervised:
    """A command that runs until `stop`, or until its end is one that lasts before it ever worked.

    What worked once is started again whatever it died of. `say` gets a sentence about each event.
    Use it as a context manager, or call `stop`.
    """

    def __init__(
        self,
        command: Command,
        log: Path,
        ready: Ready,
        back_off: BackOff | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.command = command
        self.log = log
        self.starts = 0
        self.last_ending: Ending | None = None
        self._ready_test = ready
        self._back_off = back_off or BackOff()
        self._say = say
        self._mark = uuid.uuid4().hex
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._over = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._offset = 0
        self._thread = threading.Thread(target=self._watch, name=command.name, daemon=True)

    def start(self) -> Self:
        """Start it and return at once; `wait` waits until it does its work."""
        if self.command.warning:
            self._say(self.command.warning)
        self._thread.start()
        return self

    def wait(self, timeout: float) -> bool:
        """Wait until it does its work; False when time is up.

        Raises ProcessFailed if it has ended for good.
        """
        end = time.monotonic() + timeout
        while not self._ready.wait(min(LOOK_EVERY, timeout)):
            self.check()
            if time.monotonic() >= end:
                return False
        return True

    def check(self) -> None:
        """Raise ProcessFailed if it has ended for good."""
        if self._over.is_set() and not self._stopping.is_set():
            ending = self.last_ending
            raise ProcessFailed(
                f"{ending.message if ending else self.command.name + ' failed'}\nlog: {self.log}"
            )

    @property
    def is_ready(self) -> bool:
        """Whether it does its work at this moment."""
        return self._ready.is_set()

    def written(self) -> str:
        """What it has written since it was last started."""
        try:
            with self.log.open("rb") as file:
                file.seek(self._offset)
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def stop(self, grace: float = 10.0) -> None:
        """Ask it to end, and end it and all that it has started after `grace` seconds."""
        self._stopping.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        self._clear()
        if self._thread.is_alive():
            self._thread.join(grace)

    def __enter__(self) -> Self:
        return self if self._thread.is_alive() else self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _watch(self) -> None:
        failures, worked = 0, False
        try:
            while not self._stopping.is_set():
                self._wait_for_port()
                self._spawn()
                status = self._until_end()
                was_ready = self._ready.is_set()
                self._ready.clear()
                self._clear()
                if self._stopping.is_set():
                    return
                worked = worked or was_ready
                failures = 1 if was_ready else failures + 1
                ending = explain(self.command.name, status, self.written())
                self.last_ending = ending
                if ending.lasts and not worked:
                    return
                hard = status < 0 or ending.code == 305
                pause = self._back_off.wait(failures, hard)
                self._say(f"{ending.message}; starts again in {pause:.0f} s")
                self._stopping.wait(pause)
        except OSError as error:
            self.last_ending = Ending(None, f"{self.command.name} cannot be started: {error}", True)
        finally:
            self._over.set()

    def _wait_for_port(self) -> None:
        address, end = self.command.listens, time.monotonic() + PORT_PATIENCE
        while address is not None and not is_free(address) and time.monotonic() < end:
            if self._stopping.wait(LOOK_EVERY):
                return

    def _spawn(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.log.exists() and self.log.stat().st_size > LARGEST_LOG:
            self.log.replace(self.log.with_suffix(self.log.suffix + ".old"))
        with self.log.open("ab") as file:
            self._offset = file.tell()
            process = subprocess.Popen(
                self.command.arguments,
                env=dict(self.command.environment) | {MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the one who supervises
            )
        self._process = process
        self.starts += 1
        if self._stopping.is_set():  # stop() has looked too early to see this one
            process.kill()

    def _until_end(self) -> int:
        process = self._process
        assert process is not None
        while True:
            try:
                return process.wait(LOOK_EVERY)
            except subprocess.TimeoutExpired:
                if not self._ready.is_set() and self._ready_test(self.written()):
                    self._ready.set()

    def _clear(self) -> None:
        """End all that the process has started and left, found by a mark in its environment."""
        left = [process for process in psutil.process_iter() if self._is_ours(process)]
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=5)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.pid != os.getpid() and process.environ().get(MARK) == self._mark
        except (psutil.Error, OSError):
            return False
