"""Changes of frozen weights: what algorithms add to the base model that fold updates into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from fedclip.models.lora import lora_layers
from fedclip.records import State

if TYPE_CHECKING:
    from fedclip.models.wrapper import CLIPLoRAWrapper


class ShiftedWeights:
    """The adapted layers' frozen weights, which may be replaced by their own plus a change."""

    def __init__(self, network: nn.Module) -> None:
        """Takes a network with adapters; nothing is copied before it is needed."""
        self._weights = {
            layer: cast(nn.Linear, module.get_base_layer()).weight
            for layer, module in lora_layers(network).items()
        }
        self._originals: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def set(self, shift: State) -> None:
        """Each weight becomes its own plus its change `[out, in]`; without one, its own again."""
        for layer, weight in self._weights.items():
            if layer in shift and layer not in self._originals:
                self._originals[layer] = weight.detach().clone()
            if layer in self._originals:
                weight.copy_(self._originals[layer])
            if layer in shift:
                weight.add_(shift[layer].to(weight))


@contextmanager
def replaced(model: CLIPLoRAWrapper, values: State) -> Iterator[None]:
    """Inside, those of a model's trained tensors that `values` has are these."""
    trained = model.get_parameters()
    model.set_parameters(trained | {name: values[name] for name in trained if name in values})
    try:
        yield
    finally:
        model.set_parameters(trained)
