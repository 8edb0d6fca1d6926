"""Runs of a second or so that keep different things from round to round."""

from __future__ import annotations

from typing import Any

_CLIENTS = {"rounds": 3, "num_clients": 3}
_COMMON: dict[str, Any] = {
    "model": {"model_name": "random:tiny", "lora": {"r": 2, "last_layers": 1}},
    "client": {"learning_rate": 0.01},
    "data": {"name": "digits", "max_train_examples": 24, "batch_size": 8},
    "federation": _CLIENTS,
    "evaluation": {"every": 3, "max_examples": 20},
}
_OWN: dict[str, dict[str, Any]] = {
    "fedavg": {"evaluation": {"every": 1, "max_examples": 20, "keep_best": True}},
    "scaffold": {"federation": {**_CLIENTS, "scaffold": True}, "optimizer": {"name": "sgd"}},
    "fedsa": {"federation": {**_CLIENTS, "strategy": "fedsa"}},
    "ranks": {
        "federation": {
            **_CLIENTS,
            "strategy": "flexlora",
            "dynamic_ranks": {"enabled": True, "warmup": 0},
        }
    },
    "tasks": {
        "federation": {"rounds": 3, "sharing": {"mode": "shared+task"}},
        "tasks": {name: {"name": "digits", "num_clients": 2} for name in ("one", "two")},
    },
    "fed_sb": {"federation": {**_CLIENTS, "strategy": "fed_sb"}},
    "private examples": {
        "federation": {**_CLIENTS, "strategy": "ffa"},
        "data": {"name": "digits", "max_train_examples": 36, "batch_size": 8}
        | {"partition": {"name": "iid"}},
        "privacy": {"unit": "example", "noise_multiplier": 0.3, "delta": 1e-2},
    },
    "private clients": {
        "federation": {**_CLIENTS, "strategy": "fedsvd", "num_clients": 6, "clients_per_round": 4},
        "privacy": {
            "unit": "client",
            "noise_multiplier": 0.3,
            "delta": 1e-2,
            "clip_quantile": 0.5,
            "tell": True,
        },
    },
}
RUNS = {name: _COMMON | own for name, own in _OWN.items()}
"""Configurations by name."""
