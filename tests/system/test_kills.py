"""Runs that are killed end as if they were not; `benchmarks.kills` tries a hundred."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no forks and no signals to send")
def test_two_killed_runs_end_with_the_same_bytes(tmp_path: Path) -> None:
    # A process of its own: this one may have threads, which a fork loses.
    words = ["--kills", "2", "--commands", "0", "--seed", "1", "--result", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.kills", *words]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "kills.json").read_text())["figures"] == {
        "kills": 2,
        "kills_identical": 2,
    }
