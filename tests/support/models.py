"""What the tests of the model share."""

from __future__ import annotations

import numpy as np
import torch

from fedclip.models.clip import CLIPLoRAWrapper

NAMES = ["cat", "dog", "red car"]
BOTH = {"vision_encoder": ["q_proj", "v_proj"], "text_encoder": ["q_proj", "v_proj"]}
FULL = {"lora": {"enabled": False}}
PROBE = {"head": "linear", "lora": {"target_modules": {}}}


def some_pixels() -> torch.Tensor:
    """Four images of noise, uint8 `[4, 3, 32, 32]`."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
    return torch.from_numpy(noise)


def shaken(model: CLIPLoRAWrapper, seed: int = 0) -> dict[str, torch.Tensor]:
    """Trainable tensors that differ everywhere from those of a fresh model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in model.get_parameters().items()
    }
