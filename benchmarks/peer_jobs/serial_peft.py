"""The job as a plain loop: one resident PEFT model, the clients one after another.

    python serial_peft.py <workload folder> <output json>

This is what most researchers write by hand, and what the other peers' adapters are compared with.
One process; torch uses as many threads as there are cores, its default.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from peer_task import DEVICE, ClipClassifier, load_job, train_client, write_outcome


def main(folder: Path, output: Path) -> None:
    """Run all rounds; the global state is the mean of the clients' adapters."""
    job = load_job(folder)
    model = ClipClassifier(job)
    state = {name: tensor.clone() for name, tensor in model.adapter().items()}
    round_seconds = []
    for server_round in range(1, job.rounds + 1):
        started = time.perf_counter()
        updates = []
        for client in range(job.clients):
            model.load_adapter(state)
            train_client(model, job, server_round, client)
            updates.append({name: tensor.clone() for name, tensor in model.adapter().items()})
        state = {name: torch.stack([u[name] for u in updates]).mean(dim=0) for name in state}
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        round_seconds.append(time.perf_counter() - started)
    write_outcome(output, round_seconds, state)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
