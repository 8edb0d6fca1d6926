"""Time per client from 10 to 1,000 clients a round, and what a run does outside local training.

The embedded model on digits, whole runs through `fedclip.run`: sampling, aggregation, metrics and
checkpoints are all in. For the time per client each client has 8 images of noise and one step; for
the share outside local training a run divides the digits over 100 clients, two epochs a round,
and evaluates only before and after its rounds.

    python benchmarks/scale.py      about three minutes on 2 cores
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fedclip
from benchmarks.common import write_result
from benchmarks.engine_jobs import DEVICE, PRECISION, SUFFIX, VISION, build, client_ids, engine
from fedclip.federated.rounds import run_rounds
from fedclip.federated.strategies import FedAvg
from fedclip.records import RunState

CLIENTS = (10, 100, 1000)
GROUP = 50
REGISTERED = 10_000


def main(repeats: int = 5) -> None:
    """Measures all sizes in turn and writes the result file."""
    per_client: dict[int, list[float]] = {count: [] for count in CLIENTS}
    model = build("random:tiny", VISION)
    engines = {count: engine(model, count, 8, 8, group_size=GROUP) for count in CLIENTS}
    for turn in range(repeats + 1):
        for count, trainer in engines.items():
            seconds = _round(trainer, model, count, turn + 1) / count
            if turn:
                per_client[count].append(seconds)
    # A client out of 10,000 registered ones costs what it costs out of 100.
    shares = [_overhead_share() for _ in range(3)]
    median = {count: statistics.median(values) for count, values in per_client.items()}
    figures = {
        "time_per_client_1000_over_100": median[1000] / median[100],
        "overhead_share_100_clients": statistics.median(shares),
    }
    for count, seconds in median.items():
        print(f"{count:>5} clients a round: {seconds * 1e3:.2f} ms each")
    for name, value in figures.items():
        print(f"{name:<32} {value:.3f}")
    details: dict[str, Any] = {
        "command": "python benchmarks/scale.py",
        "device": str(DEVICE),
        "precision": PRECISION,
        "group_size": GROUP,
        "seconds_per_client": per_client,
        "overhead_shares": shares,
        "sampling_seconds_of_10000": _sampling_seconds(),
    }
    write_result(f"scale{SUFFIX}", {k + SUFFIX: v for k, v in figures.items()}, details)


def _round(trainer: Any, model: Any, count: int, server_round: int) -> float:
    state = model.get_parameters()
    sizes = dict.fromkeys(client_ids(count), 8)
    started = time.perf_counter()
    for _ in run_rounds(
        RunState(state),
        trainer,
        FedAvg(),
        clients=sizes,
        rounds=server_round,
        clients_per_round=count,
        seed=0,
        finished_rounds=server_round - 1,
    ):
        pass
    return time.perf_counter() - started


def _overhead_share() -> float:
    """What is left of rounds without evaluation when local training is taken out, median."""
    config = {
        "client": {"local_epochs": 2, "learning_rate": 5e-3},
        "data": {"name": "digits", "test_fraction": 0.1, "partition": {"name": "iid"}},
        "federation": {"rounds": 8, "num_clients": 100},
        "evaluation": {"every": 1000},
    }
    with tempfile.TemporaryDirectory() as folder:
        run = fedclip.run(config, output=Path(folder) / "run")
        lines = (run.folder / "timing.jsonl").read_text().splitlines()
    timings = [json.loads(line) for line in lines]
    # Round 0 and the last one evaluate; the first one also warms up.
    return statistics.median(1 - t["training_seconds"] / t["seconds"] for t in timings[2:-1])


def _sampling_seconds() -> float:
    from fedclip.federated.rounds import sample_clients

    sizes = dict.fromkeys(client_ids(REGISTERED), 8)
    started = time.perf_counter()
    sample_clients(sizes, 100, 1, 0)
    return time.perf_counter() - started


if __name__ == "__main__":
    typer.run(main)
