"""Changes of frozen weights: what algorithms add to the base model that fold updates into it."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from fedclip.models.lora import lora_layers
from fedclip.records import State


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
