"""Full fine-tuning: the weights of the CLIP themselves, the baseline of every adapter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

from torch import nn
from transformers import CLIPModel

from fedclip.config import ModelConfig
from fedclip.models.peft_lora import base_parameters, tower_of
from fedclip.models.state import replaced
from fedclip.records import State


class FullFineTuning:
    """All weights that get a gradient."""

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "a full model"
    heading: ClassVar[str] = "Fine-tuned weights"
    asked_by: ClassVar[str] = "model.lora.enabled: false"
    model_keys: ClassVar[dict[str, Any]] = {"lora": {"enabled": False}}
    weights: ClassVar[str | None] = "model.safetensors"
    peft_format: ClassVar[bool] = False
    has_factors: ClassVar[bool] = False
    trains_base: ClassVar[bool] = True
    own_ranks = False
    unstacked: str | None = "full fine-tuning"

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """It has no settings."""
        return cls()

    def attach(self, clip: CLIPModel, *, model_name: str, seed: int) -> nn.Module:
        """The CLIP itself."""
        return clip

    def parameters(self, network: nn.Module, *, idle_text: bool) -> dict[str, nn.Parameter]:
        """All weights; with `idle_text` those of the text tower and the logit scale are frozen."""
        body = base_parameters(network)
        for name, parameter in body.items():
            parameter.requires_grad_(not (idle_text and tower_of(name) != "vision_encoder"))
        return {name: parameter for name, parameter in body.items() if parameter.requires_grad}

    def config(self, network: nn.Module) -> dict[str, Any] | None:
        """None: the tensors say it all."""
        return None

    def removed(self, network: nn.Module, base: Callable[[], State]) -> AbstractContextManager[Any]:
        """Context in which the weights are the base model's."""
        trained = {n: p for n, p in base_parameters(network).items() if p.requires_grad}
        return replaced(trained, base())

    def facts(self) -> dict[str, Any]:
        """What `get_lora_info` says of it."""
        return {"enabled": False}
