"""The job in Flower's simulation: ClientApp, ServerApp, and Flower's own FedAvg, on Ray.

    python flower_simulation.py <workload folder> <output json> [--cached]

With `--cached` an actor keeps its model between messages; Flower's examples build one for each.

Two Ray actors with one CPU and one torch thread each: on two cores this is faster than one actor
with two threads, and one CPU per client is Flower's own default.

`run_simulation` starts it. It is deprecated in favour of `flwr run`, but it is the same simulation
engine in one process that ends with the job. `flwr run` would add a local SuperLink, which stays
alive afterwards, the packing of the app, and polling between processes; all of that would count
against Flower.

Round 1 contains the start of Ray and of its actors: Flower starts them beside the ServerApp.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

# Read when Flower and Ray are imported; nobody outside is told of this run.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from flower_client import app as client_app
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peer_task import ClipClassifier, load_job, write_outcome


class TimedFedAvg(FedAvg):
    """Flower's FedAvg with a stopwatch around each round."""

    def __init__(self, clients: int) -> None:
        super().__init__(
            fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        self.round_seconds: list[float] = []
        self._started = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Start the watch; the rest is Flower's."""
        self._started = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Flower's average, then stop the watch."""
        replies = list(replies)
        errors = [message.error.reason for message in replies if message.has_error()]
        if errors:  # Flower would go on with the others, and the job would be another one.
            raise RuntimeError(f"{len(errors)} clients failed: {errors[0]}")
        aggregated = super().aggregate_train(server_round, replies)
        self.round_seconds.append(time.perf_counter() - self._started)
        return aggregated


def main(folder: Path, output: Path, *, cached: bool) -> None:
    """Run the simulation; the ServerApp writes the outcome."""
    job = load_job(folder)
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = TimedFedAvg(job.clients)
        result = strategy.start(
            grid,
            initial_arrays=ArrayRecord(ClipClassifier(job).adapter()),
            num_rounds=job.rounds,
            train_config=ConfigRecord({"workload": str(folder.resolve()), "cached": cached}),
        )
        adapter = result.arrays.to_torch_state_dict()
        write_outcome(output, strategy.round_seconds, adapter, ("flwr", "ray"))

    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=job.clients,
        backend_config={
            "init_args": {"num_cpus": 2},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), cached="--cached" in sys.argv)
