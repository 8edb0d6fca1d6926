"""LoRA dropout whose masks depend on a key, not on who ran before or beside."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fedclip.seeding import ExampleKey, seed_for

_LEVELS = 2**16
# SplitMix64's constants (Steele et al. 2014), as signed numbers of 64 bits.
_STEP, _MIX1, _MIX2 = (
    c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


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

    A CPU draws from a generator that is fastest one number after another, a GPU from one that
    computes each by itself (`counted`), as does a CPU for an `ExampleKey`: their masks differ.
    """
    if device.type != "cpu" or isinstance(key, ExampleKey):
        return counted(shape, p, torch.tensor([key], device=device), layer)
    seed = seed_for(key, "lora_dropout", layer)
    threshold = _threshold(p)
    # Sixteen random bits decide; drawn as 64 at once, this takes an eighth of torch.rand's time.
    count = shape.numel()
    bits = np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.uint16)[:count]
    return torch.from_numpy(bits >= threshold).view(shape)


def counted(shape: torch.Size, p: float, keys: torch.Tensor, layer: str) -> torch.Tensor:
    """Masks of several clients `[clients * shape[0], ...]`, by a counter-based generator.

    `keys` `[clients]` are int64 and may lie on a GPU, where nothing waits for the host. Sixteen
    bits of SplitMix64, started from a client's key and the layer, decide on each number; those of
    a shorter shape are the first of a longer one's.
    """
    words = -(-shape.numel() // 4)
    start = _mixed(keys + seed_for(0, "lora_dropout", layer))
    count = torch.arange(1, words + 1, device=keys.device)
    bits = _mixed(count.mul_(_STEP) + start[:, None]).view(torch.int16)[:, : shape.numel()]
    return (bits >= _threshold(p) - _LEVELS // 2).view(-1, *shape[1:])


def _mixed(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function."""
    z = (z ^ _shifted(z, 30)).mul_(_MIX1)
    z = (z ^ _shifted(z, 27)).mul_(_MIX2)
    return z ^ _shifted(z, 31)


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, with zeros from the left."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def keep_scale(p: float) -> float:
    """What kept values are multiplied with, so that dropout changes no mean."""
    return 1.0 / (1.0 - _threshold(p) / _LEVELS)


def _threshold(p: float) -> int:
    return round(p * _LEVELS)
