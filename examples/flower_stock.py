"""fedclip inside stock Flower: a plain ClientApp around the guide's methods, Flower's own FedAvg.

What travels is `ArrayRecord(model.get_parameters())`; what arrives goes into `set_parameters`.
Nothing here is special to fedclip's round loop, so the apps also run on a real federation: name
`client_app` and `server_app` in a Flower app's pyproject.toml. Here, both run in this process:

    pip install -e ".[flower]"
    python examples/flower_stock.py
"""

from collections.abc import Iterable

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from sklearn.datasets import load_digits

from fedclip import CLIPLoRAWrapper, create_clip_model
from fedclip.federated.client import local_train
from fedclip.federated.local_steps import LocalSettings

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SETTINGS = LocalSettings(local_epochs=1, batch_size=32, learning_rate=5e-3)


def build_model() -> CLIPLoRAWrapper:
    """The same model everywhere: one base, one seed for the adapter's start."""
    config = {"model_name": "tiny", "lora": {"r": 8, "lora_alpha": 16}}
    return create_clip_model(config, class_names=NAMES, templates=["the number {}"], seed=0)


def load_site(model: CLIPLoRAWrapper, context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of the site that Flower's node configuration names."""
    part, parts = (int(context.node_config[k]) for k in ("partition-id", "num-partitions"))
    digits = load_digits()
    mine = np.arange(len(digits.target)) % parts == part
    pixels = model.to_pixels((digits.images[mine] * 255 / 16).astype(np.uint8))
    return pixels, digits.target[mine].astype(np.int64)


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Start from the server's adapter, train it on this site, and send it back."""
    model = build_model()
    model.set_parameters(message.content["arrays"].to_torch_state_dict())
    pixels, labels = load_site(model, context)
    server_round = int(message.content["config"]["server-round"])
    done = local_train(
        model,
        pixels,
        labels,
        np.arange(len(labels)),
        SETTINGS,
        seed=1000 * server_round + int(context.node_config["partition-id"]),
        device=torch.device("cpu"),
    )
    content = {
        "arrays": ArrayRecord(model.get_parameters()),
        "metrics": MetricRecord({"num-examples": len(labels), "loss": done.loss}),
    }
    return Message(RecordDict(content), reply_to=message)


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Say how well the server's adapter does on this site."""
    model = build_model()
    model.set_parameters(message.content["arrays"].to_torch_state_dict())
    pixels, labels = load_site(model, context)
    with torch.no_grad():
        right = model(torch.from_numpy(pixels)).argmax(dim=1).numpy() == labels
    metrics = MetricRecord({"num-examples": len(labels), "accuracy": float(right.mean())})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's own FedAvg, weighted by `num-examples`, from the adapter's common start."""
    run(grid, rounds=int(context.run_config.get("rounds", 3)))


def run(grid: Grid, rounds: int) -> ArrayRecord:
    """The server's part: returns the adapter of the last round."""
    start = ArrayRecord(build_model().get_parameters())
    result = FedAvg().start(grid, initial_arrays=start, num_rounds=rounds)
    for server_round, metrics in result.evaluate_metrics_clientapp.items():
        print(f"round {server_round}: accuracy {metrics['accuracy']:.3f}", flush=True)
    return result.arrays


class InProcessGrid(Grid):
    """A grid whose sites are calls of `client_app` in this process, one after another."""

    def __init__(self, sites: int) -> None:
        # What Flower sets when it starts a server's process; messages carry it.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
        self.contexts = {
            1 + part: Context(
                run_id=1,
                node_id=1 + part,
                node_config={"partition-id": part, "num-partitions": sites},
                state=RecordDict(),
                run_config={},
            )
            for part in range(sites)
        }

    def get_node_ids(self) -> Iterable[int]:
        """Sites are numbered from 1."""
        return list(self.contexts)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Answer every message at once."""
        return [client_app(m, self.contexts[m.metadata.dst_node_id]) for m in messages]

    def _not_needed(self, *_: object) -> None:
        raise NotImplementedError("strategies call get_node_ids and send_and_receive only")

    set_run = create_message = push_messages = pull_messages = _not_needed
    run = property(_not_needed)


if __name__ == "__main__":
    run(InProcessGrid(sites=4), rounds=3)
