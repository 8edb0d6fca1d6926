"""The job in NVFlare's simulator: the Job API with its FedAvg, and a Client API script.

    python nvflare_simulator.py <workload folder> <output json>

As many simulator threads as clients, NVFlare's own default: every client then keeps its process,
with model and data, from round to round. With fewer threads the simulator ends a client's process
after each task and starts one for the next client, which imports torch and loads the model anew:
with two threads on two cores, a round of 10 clients took 34 s in place of 3 s.
Each process has one torch thread. A client takes 0.35 GB or so, which is what limits their number.

Round 1 contains the start of the clients' processes. After it, polling by the server (set to 0.1 s
here), by the clients, and by the Client API (0.5 s each, the Client API's fixed) is most of a
round. Exchanging torch tensors in place of numpy arrays, NVFlare's default, made no difference,
nor did a shorter interval between the clients' requests.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.app_opt.pt.job_config.model import PTModel
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import ScriptRunner
from nvflare_server import RoundTimer
from peer_task import load_job

HERE = Path(__file__).resolve().parent


def main(folder: Path, output: Path) -> None:
    """Describe the job and run it in the simulator."""
    # Clients are processes of their own that must find `peer_task` too.
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = folder.resolve()
    job = load_job(folder)
    federated = FedJob(name="peer", min_clients=job.clients)
    federated.to_server(
        FedAvg(num_clients=job.clients, num_rounds=job.rounds, task_check_period=0.1)
    )
    model = {"path": "nvflare_server.AdapterModel", "args": {"folder": str(folder)}}
    federated.to_server(PTModel(model))
    federated.to_server(RoundTimer(str(output.resolve())), id="round_timer")
    federated.to_clients(
        ScriptRunner(script=str(HERE / "nvflare_client.py"), script_args=str(folder))
    )
    with tempfile.TemporaryDirectory() as workspace:
        status = federated.simulator_run(workspace, n_clients=job.clients, threads=job.clients)
    if status:
        raise SystemExit(f"the simulator ended with {status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
