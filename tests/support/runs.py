"""What the tests of whole runs share."""

from fedclip.reports.listener import Listener
from tests.support.small import SMALL

CONFIG = {
    "model": {"model_name": SMALL, "lora": {"r": 2, "lora_dropout": 0.1}},
    "client": {"learning_rate": 0.01},
    "optimizer": {"schedule": "cosine"},
    "data": {
        "name": "digits",
        "max_train_examples": 90,
        "partition": {"name": "dirichlet", "alpha": 1.0, "min_size": 5},
    },
    "federation": {"rounds": 3, "num_clients": 3, "clients_per_round": 2},
    "evaluation": {"keep_best": True},
}
# Everything but times, and the report, which shows them.
COMPARED = (
    "metrics.jsonl",
    "partition.json",
    "config.yaml",
    "curves.png",
    "predictions.json",
    "checkpoint.safetensors",
    "checkpoint_previous.safetensors",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "adapter/fedclip.json",
    "adapter/README.md",
    "adapter_best/adapter_model.safetensors",
)


def with_(**sections):
    """CONFIG with keys of some sections replaced."""
    return {**CONFIG, **{name: CONFIG.get(name, {}) | keys for name, keys in sections.items()}}


def contents(folder):
    """Bytes of every file that must not depend on how often a run was stopped."""
    return {name: (folder / name).read_bytes() for name in COMPARED}


class StopAfter(Listener):
    """Presses Ctrl-C once a round is finished."""

    def __init__(self, server_round):
        self.server_round = server_round

    def round(self, record):
        if record["server_round"] == self.server_round:
            raise KeyboardInterrupt
