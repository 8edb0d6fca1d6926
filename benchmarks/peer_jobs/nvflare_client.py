"""The client of the NVFlare peer: a training script around the Client API."""

from __future__ import annotations

import sys
from pathlib import Path

import nvflare.client as flare
import torch
from peer_task import ClipClassifier, load_job, train_client


def main(folder: Path) -> None:
    """Train whenever the server sends a model, until it sends no more."""
    torch.set_num_threads(1)  # there is a process for every client, so more than cores
    flare.init()
    client = int(flare.get_site_name().removeprefix("site-")) - 1
    job = load_job(folder)
    model = ClipClassifier(job)
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        model.load_adapter(received.params)
        train_client(model, job, received.current_round + 1, client)
        update = {name: tensor.detach().clone() for name, tensor in model.adapter().items()}
        flare.send(flare.FLModel(params=update, meta={"NUM_STEPS_CURRENT_ROUND": job.steps}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
