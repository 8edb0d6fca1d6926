"""LoRA (Hu et al. 2021, arXiv:2106.09685) and DoRA, through PEFT."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any, ClassVar, Self, cast

from peft import PeftModel
from torch import nn
from transformers import CLIPModel

from fedclip.config import ModelConfig
from fedclip.models.lora_settings import LoraSettings, planned, restated
from fedclip.models.peft_lora import adapter_config, add_lora, lora_parameters
from fedclip.records import State


class Lora:
    """Factors A and B beside the layers that `settings` names, which follow changes of rank."""

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "a LoRA adapter"
    heading: ClassVar[str] = "LoRA adapter"
    asked_by: ClassVar[str] = "model.lora.enabled: true, with layers in model.lora.target_modules"
    model_keys: ClassVar[dict[str, Any]] = {}
    weights: ClassVar[str | None] = "adapter_model.safetensors"
    peft_format: ClassVar[bool] = True
    has_factors: ClassVar[bool] = True
    trains_base: ClassVar[bool] = False

    def __init__(self, settings: LoraSettings) -> None:
        self.settings = settings

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """The adapter that a configuration asks for."""
        lora = config.lora
        known = type(lora).model_fields
        same = [field.name for field in fields(LoraSettings) if field.name in known]
        values = {name: getattr(lora, name) for name in same}
        return cls(LoraSettings(**values | {"target_modules": dict(lora.target_modules)}))

    @property
    def unstacked(self) -> str | None:
        """DoRA's updates are no plain products."""
        return "DoRA" if self.settings.use_dora else None

    @property
    def own_ranks(self) -> bool:
        """Whether the ranks are no longer those of a configuration."""
        return self.settings.own_ranks

    def attach(self, clip: CLIPModel, *, model_name: str, seed: int) -> nn.Module:
        """The CLIP, frozen, in PEFT's module with an adapter."""
        self.settings = restated(self.settings, planned(clip, self.settings))
        return add_lora(clip, self.settings, model_name=model_name, seed=seed)

    def parameters(self, network: nn.Module, *, idle_text: bool) -> dict[str, nn.Parameter]:
        """A and B, under the names of `adapter_model.safetensors`."""
        return lora_parameters(network)

    def config(self, network: nn.Module) -> dict[str, Any] | None:
        """PEFT's configuration."""
        return adapter_config(cast(PeftModel, network))

    def removed(self, network: nn.Module, base: Callable[[], State]) -> AbstractContextManager[Any]:
        """Inside, the adapter has no effect."""
        return cast(PeftModel, network).disable_adapter()

    def facts(self) -> dict[str, Any]:
        """What `get_lora_info` says of it."""
        return self.settings.facts()
