"""Does `fedclip doctor` know what a run takes? Its forecast beside the run that follows.

Each forecast and each run is a process of its own, whose peak is the system's count of its resident
memory. The time is that of the run folder's summary: loading, rounds, adapters.

    python -m benchmarks.doctor     about five minutes on 2 cores
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import typer

from benchmarks.common import ROOT, write_result

CASES = {
    "quickstart": ["quickstart.yaml", "federation.rounds=4"],
    "fashion_mnist": ["fashion_mnist.yaml", "federation.rounds=2", "evaluation.every=2"],
    "vit_b_32": [
        "clip_lora.yaml",
        "model.model_name=random:openai/clip-vit-base-patch32",
        "federation.rounds=2",
        "client.local_epochs=1",
        "data.max_train_examples=64",
        "evaluation.max_examples=40",
    ],
}
LIMITS = {"quickstart": 15, "fashion_mnist": 15, "vit_b_32": 60}


def main(only: str | None = None) -> None:
    """Runs every case and writes the result file."""
    figures: dict[str, float] = {}
    load = os.getloadavg()  # of others: near 0 where the seconds mean something
    for name in (name for name in CASES if only in (None, name)):
        own = _case(*CASES[name])
        figures |= {f"{name}_{key}": value for key, value in own.items()}
        figures[f"{name}_limit_seconds"] = LIMITS[name]
        print(json.dumps({name: own}, indent=1), flush=True)
    if only is None:
        write_result("doctor", figures, {"cases": CASES, "other_load": load})


def _case(config: str, *overrides: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        given = [str(ROOT / "configs" / config), *overrides]
        text, doctor_seconds, _ = _process("doctor", *given, "--json")
        told = json.loads(text)
        run = Path(folder) / "run"
        _, _, peak = _process("run", *given, "-o", str(run))
        summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
        lines = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    return {
        "doctor_seconds": doctor_seconds,
        "predicted_seconds": told["run_seconds"],
        "measured_seconds": summary["seconds"],
        "seconds_over_measured": told["run_seconds"] / summary["seconds"],
        "predicted_round_seconds": told["round_seconds"],
        "measured_round_training_seconds": sum(line["training_seconds"] for line in lines)
        / (len(lines) - 1),
        "predicted_peak_bytes": told["peak_memory_bytes"],
        "measured_peak_bytes": peak,
        "peak_over_measured": told["peak_memory_bytes"] / peak,
    }


def _process(*words: str) -> tuple[str, float, int]:
    """Standard output, seconds and peak of a command."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "fedclip", *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"fedclip {' '.join(words)} ended with code {process.returncode}")
    return text, time.perf_counter() - started, usage.ru_maxrss * 1024


if __name__ == "__main__":
    typer.run(main)
