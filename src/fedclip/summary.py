"""The figures that a run ends with, as `summary.json` holds them."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fedclip.assembly import evaluate_unseen
from fedclip.checkpoint import Checkpoint
from fedclip.models.clip import adapter_sha256
from fedclip.parts import Parts


def summarise(
    parts: Parts, checkpoint: Checkpoint, metrics: list[dict[str, Any]]
) -> dict[str, Any]:
    """All of `summary.json` but the seconds, of the lines of `metrics.jsonl`."""
    config, counts, last = parts.config, parts.model.get_model_summary(), metrics[-1]
    trainings = parts.clients_per_round * config.federation.rounds
    return {
        "model": config.model.model_name,
        "data": config.data.name,
        "strategy": config.federation.strategy,
        "engine": config.engine.name if parts.sites is None else "flower",
        "seed": config.seed,
        "rounds": config.federation.rounds,
        "clients": len(parts.data.clients if parts.sites is None else parts.sites),
        "clients_per_round": parts.clients_per_round,
        "zero_shot_accuracy": metrics[0]["zero_shot_accuracy"],
        "initial_accuracy": metrics[0]["accuracy"],
        "accuracy": last["accuracy"],
        "validation_accuracy": last["validation_accuracy"],
        "client_accuracy": last["client_accuracy"],
        "best": checkpoint.best,
        "base_parameters": counts["base_parameters"],
        "total_parameters": counts["total_parameters"],
        "trainable_parameters": counts["trainable_parameters"],
        "bytes_up_per_client_round": checkpoint.bytes_up / trainings,
        "bytes_down_per_client_round": checkpoint.bytes_down / trainings,
        "device": str(parts.device),
        "precision": parts.precision,
        "bad_images": len(parts.data.bad_images),
        "adapter_sha256": adapter_sha256(checkpoint.state.shared),
        "state_sha256": adapter_sha256(checkpoint.state.flat()),
        "versions": {
            name: version(name) for name in ("fedclip", "torch", "transformers", "peft", "numpy")
        },
        **evaluate_unseen(
            parts, checkpoint.state, (metrics[0]["zero_shot_accuracy"], last["accuracy"])
        ),
    }
