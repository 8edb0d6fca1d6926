"""What a model says of itself: its adapter, and how many parameters it has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fedclip.models.change_rank import ranks_by_layer
from fedclip.models.peft_lora import base_parameters, lora_parameters
from fedclip.models.protocols import AdapterHost
from fedclip.models.state import adapter_sha256


def lora_info(model: AdapterHost) -> dict[str, Any]:
    """What `get_lora_info` returns; `ranks`, `alphas` and `dropouts` where layers differ."""
    facts = model.kind.facts()
    count = _count(lora_parameters(model.network).values())
    return {**facts, **ranks_by_layer(model.network), "trainable_parameters": count}


def summary(model: AdapterHost) -> dict[str, Any]:
    """What `get_model_summary` returns."""
    base = _count(base_parameters(model.network).values())
    lora = _count(lora_parameters(model.network).values())
    head = _count(model.classifier.parameters() if model.classifier is not None else ())
    total = base + lora + head
    trainable = _count(model.trainable().values())
    return {
        "model_name": model.base_name,
        "head": model.head,
        "base_parameters": base,
        "lora_parameters": lora,
        "head_parameters": head,
        "total_parameters": total,
        "trainable_parameters": trainable,
        "trainable_share": trainable / total,
    }


def base_sha256(model: AdapterHost) -> str:
    """Digest of the weights that are not trained; of full fine-tuning, of all as they came."""
    trained = set() if model.kind.trains_base else set(map(id, model.trainable().values()))
    weights = model.network.named_parameters()
    return adapter_sha256({name: p for name, p in weights if id(p) not in trained})


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
