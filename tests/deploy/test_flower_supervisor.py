"""Supervision: a process of ours stands in for Flower's: it starts, fails, hangs and is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fedclip.deploy.addresses import Address
from fedclip.deploy.flower.commands import Command
from fedclip.deploy.flower.supervisor import FOR_NODES, BackOff, ProcessFailed, Supervised

QUICK = BackOff(first=0.01, most=0.02)


def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "time is up"
        time.sleep(0.02)


def python(program: str) -> Command:
    return Command("site north", (sys.executable, "-c", program), dict(os.environ))


def pid_of(process: Supervised) -> int | None:
    """The number of the process that runs now, if one does."""
    running = process._process
    return running.pid if running is not None and running.poll() is None else None


def ready(log: str) -> bool:
    return "ready" in log


WORK = "import time; print('ready', flush=True); time.sleep(600)"


def test_it_starts_and_stops(tmp_path: Path) -> None:
    said: list[str] = []
    with Supervised(python(WORK), tmp_path / "log", ready, QUICK, said.append) as process:
        assert process.wait(120)
        assert process.is_ready
        pid = pid_of(process)
        assert pid is not None
        assert psutil.pid_exists(pid)
    assert pid_of(process) is None
    assert not psutil.pid_exists(pid)
    assert process.starts == 1
    assert said == []
    assert process.written() == "ready\n"


def test_it_starts_again_after_a_kill(tmp_path: Path) -> None:
    said: list[str] = []
    with Supervised(python(WORK), tmp_path / "log", ready, QUICK, said.append) as process:
        for number in (1, 2):
            until(lambda: process.is_ready)
            assert process.starts == number
            assert pid_of(process) is not None
            os.kill(pid_of(process), signal.SIGKILL)
            until(lambda before=number: process.starts > before)
        assert process.wait(120)
    assert said == ["site north was killed by signal 9; starts again in 0 s"] * 2
    assert (tmp_path / "log").read_text() == "ready\n" * 3
    assert process.written() == "ready\n"


def test_what_lasts_before_it_ever_worked_is_an_error(tmp_path: Path) -> None:
    program = "print('Exit Code: 302'); raise SystemExit(1)"
    process = Supervised(python(program), tmp_path / "log", ready, QUICK).start()
    with pytest.raises(ProcessFailed, match=r"site north: the private key is not .*\nlog: .*log"):
        process.wait(120)
    assert process.starts == 1
    process.stop()


def test_what_lasts_after_it_worked_is_tried_again(tmp_path: Path) -> None:
    program = (
        "print('ready', flush=True); import time; time.sleep(0.5); print('Exit Code: 605'); "
        "raise SystemExit(1)"
    )
    said: list[str] = []
    with Supervised(python(program), tmp_path / "log", ready, QUICK, said.append) as process:
        until(lambda: process.starts == 2)
        process.check()
    assert "`fedclip keys check` says why; starts again" in said[0]


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    command = Command("coordinator", (str(tmp_path / "none"),), {})
    process = Supervised(command, tmp_path / "log", ready, QUICK).start()
    with pytest.raises(ProcessFailed, match=r"coordinator cannot be started: .*No such file"):
        process.wait(120)


def test_not_ready_in_time(tmp_path: Path) -> None:
    quiet = "import time; time.sleep(600)"
    with Supervised(python(quiet), tmp_path / "log", ready, QUICK) as process:
        start = time.monotonic()
        assert not process.wait(0.5)
        assert time.monotonic() - start < 50
        assert pid_of(process) is not None


def test_children_are_stopped_too_even_those_that_went_away(tmp_path: Path) -> None:
    child = (
        "import subprocess, sys, time; "
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
        "start_new_session=True); print('ready', p.pid, flush=True); time.sleep(600)"
    )
    with Supervised(python(child), tmp_path / "log", ready, QUICK) as process:
        assert process.wait(120)
        first = int(process.written().split()[1])
        assert pid_of(process) is not None
        os.kill(pid_of(process), signal.SIGKILL)  # the child is an orphan now
        until(lambda: process.starts == 2 and process.is_ready)
        assert not psutil.pid_exists(first)
        second = int(process.written().split()[1])
    assert not psutil.pid_exists(second)


def test_one_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('ready', flush=True); time.sleep(600)"
    )
    process = Supervised(python(deaf), tmp_path / "log", ready, QUICK).start()
    assert process.wait(120)
    start = time.monotonic()
    process.stop(grace=0.3)
    assert time.monotonic() - start < 50
    assert pid_of(process) is None


def test_stopping_while_it_waits_to_start_again(tmp_path: Path) -> None:
    slow = BackOff(first=60)
    said: list[str] = []
    process = Supervised(python("pass"), tmp_path / "log", ready, slow, said.append).start()
    until(lambda: said)
    start = time.monotonic()
    process.stop()
    assert time.monotonic() - start < 50
    assert process.starts == 1


def test_it_waits_until_its_port_is_left(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = replace(python(WORK), listens=Address("127.0.0.1", port))
        process = Supervised(command, tmp_path / "log", ready, QUICK).start()
        assert not process.wait(0.5)
        assert process.starts == 0
    assert process.wait(120)
    process.stop()


def test_a_long_log_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedclip.deploy.flower.supervisor.LARGEST_LOG", 10)
    (tmp_path / "log").write_text("x" * 11)
    with Supervised(python(WORK), tmp_path / "log", ready, QUICK) as process:
        assert process.wait(120)
    assert (tmp_path / "log").read_text() == "ready\n"
    assert (tmp_path / "log.old").read_text() == "x" * 11


def test_the_warning_is_said_first(tmp_path: Path) -> None:
    said: list[str] = []
    command = Command("north", (sys.executable, "-c", WORK), {}, None, "insecure")
    with Supervised(command, tmp_path / "log", ready, QUICK, said.append):
        assert said == ["insecure"]


# --- the wait ---


def test_waits_double_up_to_a_most() -> None:
    back_off = BackOff(first=1, most=60)
    waits = [back_off.wait(failures, hard=False) for failures in (0, 1, 2, 3, 6, 7, 8, 10_000)]
    assert waits == [1, 1, 2, 4, 32, 60, 60, 60]


def test_a_node_with_a_key_waits_for_flowers_window() -> None:
    assert FOR_NODES.wait(1, hard=True) == 62
    assert FOR_NODES.wait(1, hard=False) == 2
    assert FOR_NODES.wait(20, hard=True) == 120


def test_the_window_is_flowers() -> None:
    constants = pytest.importorskip("flwr.common.constant")
    window = constants.HEARTBEAT_DEFAULT_INTERVAL * constants.HEARTBEAT_PATIENCE
    assert FOR_NODES.window > window == 60


# --- the process ends with the one that started it ---


def test_a_flower_process_ends_with_its_parent(tmp_path: Path) -> None:
    child = (
        "import threading, os, time\n"
        "from fedclip.deploy.flower import process as f\n"
        "f.LOOK_EVERY = 0.05\n"
        "threading.Thread(target=f.end_with, args=(os.getppid(),), daemon=True).start()\n"
        "print(os.getpid(), flush=True)\ntime.sleep(600)\n"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert psutil.pid_exists(pid)
        process.kill()
    until(lambda: not psutil.pid_exists(pid))
