"""The ClientApp of the Flower peer: an importable module, as in the apps that `flwr new` makes.

As in the apps that Flower's templates make, each message builds the model and loads what the server
sent into it. Flower hands the app to its Ray actors by reference to this module, so what is cached
here stays in an actor's process between messages: the data always, and the model too where the
server's configuration says `cached`, which a user who knows the actors would do.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peer_task import ClipClassifier, Job, load_job, train_client

app = ClientApp()


@lru_cache(maxsize=1)
def load(folder: str) -> Job:
    """Data of this process."""
    torch.set_num_threads(1)  # an actor has one CPU
    return load_job(Path(folder))


@lru_cache(maxsize=1)
def kept_model(folder: str) -> ClipClassifier:
    """The one model of this process."""
    return ClipClassifier(load(folder))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Start from the server's adapter, train it, and send it back."""
    config = message.content["config"]
    folder = str(config["workload"])
    job = load(folder)
    model = kept_model(folder) if config["cached"] else ClipClassifier(job)
    model.load_adapter(message.content["arrays"].to_torch_state_dict())
    train_client(model, job, int(config["server-round"]), int(context.node_config["partition-id"]))
    content = {
        "arrays": ArrayRecord(model.adapter()),
        "metrics": MetricRecord({"num-examples": job.client_size}),
    }
    return Message(RecordDict(content), reply_to=message)
