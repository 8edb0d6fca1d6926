"""What the tests of the model share."""

from __future__ import annotations

import torch

from fedclip.models.clip import CLIPLoRAWrapper

NAMES = ["cat", "dog", "red car"]


def shaken(model: CLIPLoRAWrapper, seed: int = 0) -> dict[str, torch.Tensor]:
    """Trainable tensors that differ everywhere from those of a fresh model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in model.get_parameters().items()
    }
