"""LoRA dropout whose masks depend on a key, not on who ran before or beside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fedclip.seeding import seed_for


class KeyedDropout(nn.Module):
    """Dropout with a mask drawn from (key, layer name); ordinary dropout while no key is set.

    One key stands for one client, round and micro-step. Engines that run clients in another order
    draw the same masks, and so does a layer that gradient checkpointing computes twice. It holds
    no tensors, so a state dict looks as it does with `nn.Dropout`.
    """

    def __init__(self, p: float, layer: str) -> None:
        super().__init__()
        self.p = p
        self.layer = layer
        self.key: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zero a share `p` of `x` while training, and scale the rest by 1 / (1 - p)."""
        if not self.training or self.p == 0.0:
            return x
        if self.key is None:
            return F.dropout(x, self.p)
        return x * keep_mask(x.shape, self.p, self.key, self.layer, x.device).to(x.dtype)

    def extra_repr(self) -> str:
        """Show the share that is dropped."""
        return f"p={self.p}"


def keep_mask(
    shape: torch.Size, p: float, key: int, layer: str, device: torch.device
) -> torch.Tensor:
    """Mask of one layer and micro-step: 1 / (1 - p) where kept, 0 where dropped, fp32."""
    generator = torch.Generator(device).manual_seed(seed_for(key, "lora_dropout", layer))
    # Comparing uniform numbers takes half the time of bernoulli_.
    kept = torch.rand(shape, device=device, generator=generator) >= p
    return kept / (1.0 - p)
