"""The same federated LoRA job in fedclip and in its peers: a steady round, and the whole job.

Every program gets the same model, images, batches, optimizer and starting adapter, and ends with
the same adapter (checked). The model is the vision tower of 4 layers and width 128 on 32 x 32
pixels, with CLIP's own activation, random weights and fixed text features. One program runs at a
time, all in turn, several times over; figures are medians. NVFlare runs the large batches only: it
keeps a process for every client, and 32 of them want 12 GB. On a GPU, in bf16, fedclip and the
serial loop run alone: the other peers' environments hold torch for CPUs.

    python -m benchmarks.peer_jobs.environments    once: an environment for each peer
    python benchmarks/peers.py                     about 15 minutes on 2 cores
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_result
from benchmarks.engine_jobs import SUFFIX
from benchmarks.peer_jobs.environments import PEERS_FOLDER, SCRIPTS, SERIAL, python_of
from benchmarks.peer_jobs.workload import LARGE, SMALL, write_workload

ROUNDS = 10
STEADY = 2  # rounds before this one hold what happens once
ON_GPU = torch.cuda.is_available()
# How far adapters may lie apart; in bf16 AdamW's first steps may turn a small gradient's sign.
SAME = 0.5 if ON_GPU else 1e-3
FEDCLIP = "fedclip"
SHAPES = {"large": LARGE, "small": SMALL}

# figure: shape, our program, theirs, and what of them
RATIOS = {
    "round_vs_flower": ("large", FEDCLIP, "flower", "rounds"),
    "round_vs_flower_cached": ("large", FEDCLIP, "flower cached", "rounds"),
    "job_vs_flower_cached": ("large", FEDCLIP, "flower cached", "jobs"),
    "round_vs_serial_peft": ("large", FEDCLIP, SERIAL, "rounds"),
    "small_batches_vs_serial_peft": ("small", FEDCLIP, SERIAL, "rounds"),
    "job_vs_flower": ("large", FEDCLIP, "flower", "jobs"),
    "round_vs_pfl": ("large", FEDCLIP, "pfl", "rounds"),
    "small_batches_vs_pfl": ("small", FEDCLIP, "pfl", "rounds"),
    "job_vs_pfl": ("large", FEDCLIP, "pfl", "jobs"),
    "small_batches_job_vs_pfl": ("small", FEDCLIP, "pfl", "jobs"),
    "small_batches_vs_flower": ("small", FEDCLIP, "flower", "rounds"),
    "round_vs_nvflare": ("large", FEDCLIP, "nvflare", "rounds"),
}


@dataclass
class Arm:
    """One program, and what was measured of it, run by run."""

    name: str
    command: list[str]
    rounds: list[float] = field(default_factory=list)
    jobs: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    difference: float = 0.0


def main(
    repeats: Annotated[int, typer.Option(help="Runs of each program.")] = 3,
    without: Annotated[list[str] | None, typer.Option(help="Programs to leave out.")] = None,
    nvflare_repeats: Annotated[int, typer.Option(help="Runs of NVFlare, minutes each.")] = 1,
) -> None:
    """Runs all programs in turn, prints the table and writes the result file."""
    found = {}
    for shape, size in SHAPES.items():
        workload = PEERS_FOLDER / f"workload-{shape}"
        write_workload(workload, **size, rounds=ROUNDS, seed=0)
        left_out = {*(without or ()), *(["nvflare"] if shape == "small" else [])}
        arms = [arm for arm in _arms() if arm.name not in left_out]
        for turn in range(repeats):
            for arm in arms:
                if arm.name == "nvflare" and turn >= nvflare_repeats:
                    continue
                _measure(arm, workload)
                Console(stderr=True).print(
                    f"{shape:<6} {arm.name:<17} round {arm.rounds[-1]:.3f} s  "
                    f"job {arm.jobs[-1]:.1f} s  difference {arm.difference:.0e}"
                )
        found[shape] = {arm.name: arm for arm in arms}
    _print(found)
    details = {
        "command": "python benchmarks/peers.py",
        "rounds": ROUNDS,
        "shapes": SHAPES,
        "threads": torch.get_num_threads(),
        "programs": {s: {a.name: _facts(a) for a in arms.values()} for s, arms in found.items()},
    }
    if not without:
        figures = {name + SUFFIX: value for name, value in _figures(found).items()}
        Console().print(f"written to {write_result(f'peers{SUFFIX}', figures, details)}")


def _arms() -> list[Arm]:
    """Every peer's program after fedclip's own."""
    own = [sys.executable, str(Path(__file__).parent / "peer_jobs" / "fedclip_batched.py")]
    peers = {name: [str(python_of(name)), str(script)] for name, script in SCRIPTS.items()}
    here = [Arm(SERIAL, peers[SERIAL]), Arm(FEDCLIP, own)]
    if ON_GPU:
        return here
    return [
        *here,
        Arm("flower", peers["flower"]),
        Arm("flower cached", [*peers["flower"], "--cached"]),
        Arm("pfl", peers["pfl"]),
        Arm("nvflare", peers["nvflare"]),
    ]


def _measure(arm: Arm, workload: Path) -> None:
    """One run, from the start of the process to its end."""
    output = workload / f"{arm.name.replace(' ', '-')}.json"
    options = arm.command[2:]
    started = time.perf_counter()
    ran = subprocess.run(
        [*arm.command[:2], str(workload), str(output), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    arm.jobs.append(time.perf_counter() - started)
    if ran.returncode:
        raise SystemExit(f"{arm.name} failed:\n{ran.stderr[-3000:]}")
    outcome = json.loads(output.read_text())
    arm.rounds.append(statistics.median(outcome["round_seconds"][STEADY:]))
    arm.versions = outcome["versions"]
    arm.difference = _difference(load_file(f"{output}.safetensors"), workload)
    if arm.difference > SAME:
        raise SystemExit(f"{arm.name} ended with another adapter: {arm.difference:.1e} apart")


def _difference(adapter: dict[str, torch.Tensor], workload: Path) -> float:
    """Largest relative distance of a tensor from the serial loop's."""
    reference = load_file(workload / f"{SERIAL}.json.safetensors")
    if adapter.keys() != reference.keys():
        raise SystemExit("a program's adapter has other tensors than the serial loop's")
    return max(
        float((adapter[name] - tensor).norm() / tensor.norm()) for name, tensor in reference.items()
    )


def _facts(arm: Arm) -> dict[str, Any]:
    return {
        "round_seconds": statistics.median(arm.rounds),
        "round_seconds_of_each_run": arm.rounds,
        "job_seconds": statistics.median(arm.jobs),
        "job_seconds_of_each_run": arm.jobs,
        "difference_from_serial": arm.difference,
        "versions": arm.versions,
    }


def _figures(found: dict[str, dict[str, Arm]]) -> dict[str, float]:
    """Ratios: the peer's time over ours, each the median over runs that followed each other."""
    figures = {}
    for name, (shape, ours, theirs, what) in RATIOS.items():
        arms = found[shape]
        if ours in arms and theirs in arms:
            own, peer = (getattr(arms[one], what) for one in (ours, theirs))
            figures[name] = statistics.median(b / a for a, b in zip(own, peer, strict=False))
    return figures


def _print(found: dict[str, dict[str, Arm]]) -> None:
    table = Table("program", *(f"{s}: {what}" for s in found for what in ("round", "job")))
    for name in next(iter(found.values())):
        cells = []
        for arms in found.values():
            arm = arms.get(name)
            cells.append(f"{statistics.median(arm.rounds):.3f} s" if arm else "-")
            cells.append(f"{statistics.median(arm.jobs):.1f} s" if arm else "-")
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
