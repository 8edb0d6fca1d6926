"""LoRA dropout whose masks depend on a key, not on who ran before or beside."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fedclip.seeding import seed_for

_LEVELS = 2**16


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
        return x * kept(x.shape, self.p, self.key, self.layer, x.device) * keep_scale(self.p)

    def extra_repr(self) -> str:
        """Show the share that is dropped."""
        return f"p={self.p}"


def set_dropout_key(network: nn.Module, key: int | None) -> None:
    """Give all layers of a network one key."""
    for module in network.modules():
        if isinstance(module, KeyedDropout):
            module.key = key


def kept(shape: torch.Size, p: float, key: int, layer: str, device: torch.device) -> torch.Tensor:
    """Mask of one layer and micro-step: True where kept. A share of `p` to 1 / 65536 is dropped.

    CPU and GPU draw from generators of their own, and so other masks.
    """
    seed = seed_for(key, "lora_dropout", layer)
    threshold = _threshold(p)
    if device.type != "cpu":
        generator = torch.Generator(device).manual_seed(seed)
        draws = torch.rand(shape, device=device, generator=generator)
        return draws >= threshold / _LEVELS
    # Sixteen random bits decide; drawn as 64 at once, this takes an eighth of torch.rand's time.
    count = shape.numel()
    bits = np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.uint16)[:count]
    return torch.from_numpy(bits >= threshold).view(shape)


def keep_scale(p: float) -> float:
    """What kept values are multiplied with, so that dropout changes no mean."""
    return 1.0 / (1.0 - _threshold(p) / _LEVELS)


def _threshold(p: float) -> int:
    return round(p * _LEVELS)
