"""The main job measured: LoRA against full fine-tuning, pretrained against random weights.

Three data sets, three seeds. Every arm runs the same configuration but for what its name says and
its learning rate; `--tune` chooses rates on validation accuracy, with a seed of its own. Runs that
are finished are not repeated, so the benchmark may be killed and started again.

    python benchmarks/main_job.py            about an hour on 2 cores
    python benchmarks/main_job.py --tune     the learning rates, about half an hour
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, mean_and_spread, write_result

CONFIGS = {"digits": "quickstart", "fashion_mnist": "fashion_mnist", "icons": "icons"}
ARMS: dict[str, tuple[str, ...]] = {
    "lora": (),
    "full": ("model.lora.enabled=false",),
    "random": ("model.model_name=random:tiny",),
}
# Both LoRA arms take their configuration's rate. For digits --tune found the best rate of full
# fine-tuning at a tenth of that; the long jobs were not tuned and take a tenth as well.
RATES = {
    ("digits", "full"): 1e-3,
    ("fashion_mnist", "full"): 1e-3,
    ("icons", "full"): 5e-4,
}
GRID = {
    "lora": (5e-3, 1e-2, 2e-2),
    "full": (3e-4, 1e-3, 3e-3),
    "random": (3e-3, 1e-2, 3e-2),
}
# The long jobs are tuned on a part of them.
SHORTER = {
    "fashion_mnist": ("data.max_train_examples=3000",),
    "icons": ("federation.rounds=6",),
}
SEEDS = (0, 1, 2)
TUNING_SEED = 100


@dataclass(frozen=True)
class Job:
    """One run of the grid."""

    data: str
    arm: str
    seed: int
    rate: float | None
    tuning: bool = False

    @property
    def name(self) -> str:
        """Name of its run folder."""
        rate = "" if self.rate is None else f"-{self.rate:g}"
        return f"{self.data}-{self.arm}-{self.seed}{rate}"

    @property
    def overrides(self) -> list[str]:
        """What differs from the configuration file."""
        rate = [] if self.rate is None else [f"client.learning_rate={self.rate}"]
        shorter = SHORTER.get(self.data, ()) if self.tuning else ()
        return [*ARMS[self.arm], f"seed={self.seed}", *rate, *shorter]


def main(
    work: Annotated[Path, typer.Option(help="Folder of the runs.")] = ROOT / "runs" / "main_job",
    tune: Annotated[bool, typer.Option(help="Choose learning rates on validation.")] = False,
    jobs: Annotated[int, typer.Option(help="Runs at a time, one thread each.")] = 2,
    data: Annotated[list[str] | None, typer.Option(help="Only these data sets.")] = None,
) -> None:
    """Runs what is missing of the grid, prints the table and writes the result file."""
    chosen = data or list(CONFIGS)
    if tune:
        _print_tuning(chosen, _run_all(_tuning_grid(chosen), work / "tune", jobs))
        return
    # The time of the quickstart is measured alone, with all cores, before the others share them.
    timed = _run_all([Job("digits", "lora", s, None) for s in SEEDS], work / "timed", 1)
    grid = [
        Job(d, arm, seed, RATES.get((d, arm))) for d in chosen for arm in ARMS for seed in SEEDS
    ]
    summaries = _run_all(grid, work, jobs)
    figures, details = _figures(summaries)
    seconds = sorted(s["seconds"] for s in timed.values())
    figures["quickstart_seconds"] = seconds[len(seconds) // 2]
    details["quickstart_seconds_of_each_seed"] = seconds
    details["command"] = "python benchmarks/main_job.py"
    _print_table(figures, details, chosen)
    if set(chosen) == set(CONFIGS):
        Console().print(f"written to {write_result('main_job', figures, details)}")


def _tuning_grid(chosen: Iterable[str]) -> list[Job]:
    return [
        Job(d, arm, TUNING_SEED, rate, tuning=True)
        for d in chosen
        for arm in ARMS
        for rate in GRID[arm]
    ]


def _run_all(jobs: Sequence[Job], work: Path, at_a_time: int) -> dict[Job, dict[str, Any]]:
    """Summaries of all jobs; those already finished are read from their folders."""
    threads = (os.cpu_count() or 1) if at_a_time == 1 else 1
    with ThreadPoolExecutor(at_a_time) as pool:
        summaries = pool.map(lambda job: _run_one(job, work, threads), jobs)
        return dict(zip(jobs, summaries, strict=True))


def _run_one(job: Job, work: Path, threads: int) -> dict[str, Any]:
    folder = work / job.name
    summary = folder / "summary.json"
    if not summary.exists():
        config = str(ROOT / "configs" / f"{CONFIGS[job.data]}.yaml")
        new = [config, *job.overrides, "--output", str(folder)]
        resumed = ["--resume", str(folder)]
        command = ["fedclip", "run", *(resumed if folder.exists() else new)]
        program = "import sys; from fedclip.cli.main import main; sys.argv[0] = 'fedclip'; main()"
        ran = subprocess.run(
            [sys.executable, "-c", program, *command[1:]],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode:
            raise SystemExit(f"{job.name} failed:\n{ran.stderr[-3000:]}")
    found = json.loads(summary.read_text())
    Console(stderr=True).print(
        f"{job.name:<32} accuracy {found['accuracy']:.4f}  "
        f"validation {found['validation_accuracy']:.4f}  {found['seconds']:.0f} s"
    )
    return found


def _figures(
    summaries: dict[Job, dict[str, Any]],
) -> tuple[dict[str, float], dict[str, Any]]:
    figures: dict[str, float] = {}
    details: dict[str, Any] = {"seeds": list(SEEDS), "cells": {}}
    for job in summaries:
        cell = f"{job.data}_{job.arm}"
        if f"accuracy_{cell}" in figures:
            continue
        runs = [s for j, s in summaries.items() if (j.data, j.arm) == (job.data, job.arm)]
        mean, deviation = mean_and_spread([s["accuracy"] for s in runs])
        figures[f"accuracy_{cell}"] = mean
        details["cells"][cell] = {
            "accuracy_by_seed": [s["accuracy"] for s in runs],
            "standard_deviation": deviation,
            "zero_shot_by_seed": [s["zero_shot_accuracy"] for s in runs],
            "client_accuracy": [s["client_accuracy"] for s in runs],
            "learning_rate": job.rate,
            "trainable_parameters": runs[0]["trainable_parameters"],
            "bytes_up_per_client_round": runs[0]["bytes_up_per_client_round"],
            "rounds": runs[0]["rounds"],
            "clients": runs[0]["clients"],
            "seconds": [s["seconds"] for s in runs],
        }
        if job.arm == "lora":
            figures[f"zero_shot_{job.data}"] = mean_and_spread(
                [s["zero_shot_accuracy"] for s in runs]
            )[0]
    return figures, details


def _print_tuning(chosen: Iterable[str], found: dict[Job, dict[str, Any]]) -> None:
    for data in chosen:
        for arm in ARMS:
            arms = {j.rate: s for j, s in found.items() if (j.data, j.arm) == (data, arm)}
            best = max(arms, key=lambda rate: arms[rate]["validation_accuracy"])
            Console().print(f"({data!r}, {arm!r}): {best:g}")


def _print_table(figures: dict[str, float], details: dict[str, Any], chosen: Iterable[str]) -> None:
    table = Table("data", "zero-shot", *ARMS)
    for data in chosen:
        cells = (
            f"{figures[f'accuracy_{data}_{arm}']:.3f} ± "
            f"{details['cells'][f'{data}_{arm}']['standard_deviation']:.3f}"
            for arm in ARMS
        )
        table.add_row(data, f"{figures[f'zero_shot_{data}']:.3f}", *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
