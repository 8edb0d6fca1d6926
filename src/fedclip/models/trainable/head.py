"""A head alone on the frozen CLIP: a linear probe (Radford et al. 2021, arXiv:2103.00020, 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self

from torch import nn
from transformers import CLIPModel

from fedclip.config import ModelConfig
from fedclip.records import State


class HeadAlone:
    """Nothing but the linear head, whose tensors the model itself knows."""

    name: ClassVar[str] = "head"
    title: ClassVar[str] = "a linear head alone"
    heading: ClassVar[str] = "Linear head"
    asked_by: ClassVar[str] = "model.head: linear, with no layers in model.lora.target_modules"
    model_keys: ClassVar[dict[str, Any]] = {
        "head": "linear",
        "lora": {"target_modules": {}},
    }
    weights: ClassVar[str | None] = None
    peft_format: ClassVar[bool] = False
    has_factors: ClassVar[bool] = False
    trains_base: ClassVar[bool] = False
    own_ranks = False
    unstacked: str | None = None

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """It has no settings."""
        return cls()

    def attach(self, clip: CLIPModel, *, model_name: str, seed: int) -> nn.Module:
        """The CLIP, frozen."""
        return clip.requires_grad_(False)

    def parameters(self, network: nn.Module, *, idle_text: bool) -> dict[str, nn.Parameter]:
        """None besides the head's."""
        return {}

    def config(self, network: nn.Module) -> dict[str, Any] | None:
        """None: the head is saved by the model."""
        return None

    def removed(self, network: nn.Module, base: Callable[[], State]) -> AbstractContextManager[Any]:
        """Inside and outside, the network is the base."""
        return nullcontext()

    def facts(self) -> dict[str, Any]:
        """What `get_lora_info` says of it."""
        return {"enabled": False}
