"""Peak memory and time: LoRA against full fine-tuning, clients per round, registered clients, rank.

Each measurement is a process of its own, whose peak is the system's count of its resident memory
(on a GPU: the allocator's). ViT-B/32 with random weights takes two steps of 32 images, prompts
trimmed in all arms; the smaller measurements use the embedded architecture.

    python benchmarks/memory.py     about five minutes on 2 cores
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_result
from benchmarks.engine_jobs import (
    DEVICE,
    PRECISION,
    SUFFIX,
    VISION,
    build,
    client_ids,
    engine,
    train_round,
)
from fedclip.federated.rounds import run_rounds
from fedclip.federated.strategies import FedAvg
from fedclip.records import RunState

TINY = "random:tiny"
STEPS = {"full": {"full": True}, "lora": {}, "lora_checkpointed": {"checkpointing": True}}


def main(
    case: Annotated[str | None, typer.Option(help="One measurement, as a process of it.")] = None,
    repeats: int = 3,
) -> None:
    """Runs all measurements in turn and writes the result file."""
    if case is not None:
        print(json.dumps(_case(json.loads(case))))
        return
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in STEPS}
    for _ in range(repeats):
        for name in STEPS:
            steps[name].append(_run({"kind": "step", "name": name}))
            print(name, steps[name][-1])
    grids: dict[str, dict[int, float]] = {}
    for what, values in (
        ("clients_per_round", (10, 100, 1000)),
        ("rank", (4, 16, 64)),
        ("registered", (100, 10_000)),
    ):
        cases = [{"kind": what, "value": value} for value in values]
        with ThreadPoolExecutor(len(cases) if DEVICE.type == "cuda" else 1) as pool:
            peaks = [found["peak"] for found in pool.map(_run, cases)]
        grids[what] = dict(zip(values, peaks, strict=True))
        print(what, {value: f"{peak / 1e6:.0f} MB" for value, peak in grids[what].items()})

    def median(name: str, what: str) -> float:
        return statistics.median(found[what] for found in steps[name])

    figures = {
        "lora_step_over_full": median("lora", "seconds") / median("full", "seconds"),
        "lora_memory_over_full": median("lora", "peak") / median("full", "peak"),
        "lora_checkpointed_memory_over_full": median("lora_checkpointed", "peak")
        / median("full", "peak"),
        "lora_bytes_over_full": steps["lora"][0]["bytes"] / steps["full"][0]["bytes"],
        "memory_10000_over_100_registered": grids["registered"][10_000] / grids["registered"][100],
    }
    for name, value in figures.items():
        print(f"{name:<36} {value:.4f}")
    details = {
        "command": "python benchmarks/memory.py",
        "device": str(DEVICE),
        "precision": PRECISION,
        "steps": steps,
        "peak_bytes": grids,
    }
    write_result(f"memory{SUFFIX}", {k + SUFFIX: v for k, v in figures.items()}, details)


def _run(case: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _case(case: dict[str, Any]) -> dict[str, Any]:
    if case["kind"] == "step":
        return _steps(case["name"])
    clients, rank = 100, 8
    registered = None
    if case["kind"] == "clients_per_round":
        clients = case["value"]
    elif case["kind"] == "rank":
        rank = case["value"]
    else:
        registered = case["value"]
    model = build(TINY, VISION, r=rank)
    sizes, owned = dict.fromkeys(client_ids(registered or clients), 8), None
    if registered is not None:  # many clients over the same 800 images
        rng = np.random.default_rng(0)
        owned = {c: np.sort(rng.choice(800, 8, replace=False)) for c in sizes}
    trainer = engine(model, clients, 8, 8, group_size=50, owned=owned)
    for _ in run_rounds(
        RunState(model.get_parameters()),
        trainer,
        FedAvg(),
        clients=sizes,
        rounds=2,
        clients_per_round=clients,
        seed=0,
    ):
        pass
    return {"peak": _peak()}


def _steps(name: str) -> dict[str, Any]:
    """Two rounds of one step; the second one's seconds."""
    options: dict[str, Any] = STEPS[name]
    model = build(**options)
    # Full fine-tuning has no adapters to stack and runs on the sequential engine.
    trainer = engine(model, 1, 32, 32, sequential=name == "full")
    train_round(trainer, model, 1)
    seconds = train_round(trainer, model, 1, 2)
    payload = sum(p.numel() * 4 for p in model.trainable().values())
    return {"seconds": seconds, "peak": _peak(), "bytes": payload}


def _peak() -> float:
    """Bytes at most in use so far."""
    if DEVICE.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


if __name__ == "__main__":
    typer.run(main)
