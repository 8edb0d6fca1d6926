"""The job on fedclip's batched engine, through its Python API.

    python fedclip_batched.py <workload folder> <output json>

One process, on a GPU where there is one; on a CPU torch uses as many threads as there are cores,
its default.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from peer_task import write_outcome

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peer_jobs.workload import open_for_fedclip
from fedclip.device import keep_freed_memory, product_dtype, resolve_device, resolve_precision
from fedclip.federated.engines.batched import BatchedEngine
from fedclip.federated.engines.threads import on_all_threads
from fedclip.federated.rounds import run_rounds
from fedclip.federated.strategies import FedAvg
from fedclip.models.stacked.clients import StackedClients
from fedclip.models.stacked.prefix_cache import PixelInputs
from fedclip.records import RunState


def main(folder: Path, output: Path) -> None:
    """Run all rounds, all clients of a round in one group."""
    keep_freed_memory()  # as the command line does
    job = open_for_fedclip(folder)
    device = resolve_device("auto")
    precision = resolve_precision("auto", device)
    model = job.model.to(device)
    engine = on_all_threads(
        BatchedEngine(
            StackedClients(model, products=product_dtype(precision)),
            job.pixels,
            job.labels,
            job.clients,
            replace(job.settings, precision=precision),
            images=PixelInputs(job.pixels, device),
            group_size=len(job.clients),
            seed=job.seed,
            device=device,
            padded=device.type != "cpu",
            static=device.type == "cuda",
        )
    )
    round_seconds = []
    started = time.perf_counter()
    for result in run_rounds(
        RunState(model.get_parameters()),
        engine,
        FedAvg(),
        clients={client_id: len(indices) for client_id, indices in job.clients.items()},
        rounds=job.rounds,
        clients_per_round=len(job.clients),
        seed=job.seed,
    ):
        now = time.perf_counter()
        round_seconds.append(now - started)
        started, state = now, result.state.shared
    write_outcome(output, round_seconds, state)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
