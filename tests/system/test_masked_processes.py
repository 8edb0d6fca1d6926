"""Masked sums over Flower with TLS on loopback, and sites that are killed in the middle."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedclip.deploy.messages.envelope import read_header
from fedclip.deploy.remote.last_sum import LAST_SUM
from tests.system.test_machines_processes import Lab

pytestmark = pytest.mark.federation
pytest.importorskip("flwr")

SIZES = {"north": 24, "south": 16, "west": 30, "east": 20}
MASKED: dict[str, Any] = {"secure": {"aggregation": "masked"}}
ONCE = {"round_deadline": 40.0, "attempts": 1}


def kill(process: subprocess.Popen[bytes]) -> None:
    """A site and all that it has started, at once, as a power cut would."""
    whole = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in whole:
        with suppress(psutil.Error):
            one.send_signal(signal.SIGKILL)


def federation(rounds: int, clients: int) -> dict[str, Any]:
    return {"strategy": "ffa", "rounds": rounds, "num_clients": clients}


def test_four_sites_of_whom_one_is_killed_end_with_the_sums_of_three(tmp_path: Path) -> None:
    lab = Lab(tmp_path, keyed=True, sizes=SIZES, federation=federation(3, 4), deploy=ONCE, **MASKED)
    with lab.sites() as sites:
        coordinator = lab.coordinator()
        lab.until(lambda: lab.finished_rounds() == 1)
        time.sleep(1)
        kill(sites["south"])
        lab.until(lambda: coordinator.poll() is not None)
    assert coordinator.returncode == 0, lab.said()
    lines = [json.loads(line) for line in (lab.run / "metrics.jsonl").read_text().splitlines()]
    took_part = [set(line.get("clients", ())) for line in lines]
    assert took_part[1] == set(SIZES)
    assert took_part[3] == set(SIZES) - {"south"}
    assert all(own["loss"] is None for line in lines[1:] for own in line["clients"].values())
    assert all(line["loss"] > 0 for line in lines[1:])
    assert lab.summary()["secure"] == {"aggregation": "masked", "threshold": 3}
    assert "south" in lab.said()


def test_three_sites_of_whom_one_is_killed_end_with_one_line_and_no_sum(tmp_path: Path) -> None:
    sizes = {name: SIZES[name] for name in ("north", "south", "west")}
    lab = Lab(tmp_path, keyed=True, sizes=sizes, federation=federation(3, 3), deploy=ONCE, **MASKED)
    with lab.sites() as sites:
        coordinator = lab.coordinator()
        lab.until(lambda: lab.finished_rounds() == 1)
        kill(sites["south"])
        lab.until(lambda: coordinator.poll() is not None)
    assert coordinator.returncode == 1, lab.said()
    rounds = lab.finished_rounds()
    assert rounds < 3
    *_, last = lab.said().strip().splitlines()
    assert f"round {rounds + 1}: 2 of 3" in last
    assert "a masked sum needs 3" in last
    kept = read_header((lab.run / "deploy" / LAST_SUM).read_bytes())
    assert kept["round"] == rounds
