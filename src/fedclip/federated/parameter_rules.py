"""What training does by kind of tensor: which decay, and CLIP's bound on its temperature."""

from __future__ import annotations

import math

import torch

from fedclip.records import State

MAX_LOGIT_SCALE = math.log(100)
"""CLIP (Radford et al. 2021, section 2.5) keeps its logits from being scaled by more than 100."""


def decays(shape: torch.Size) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to what has one number a channel.

    Norms, biases, the temperature and DoRA's magnitudes have no zero that they should fall to.
    """
    return len(shape) > 1


@torch.no_grad()
def bound_temperature(tensors: State) -> None:
    """Brings a CLIP's temperature down to `MAX_LOGIT_SCALE`, in place, where it is among these."""
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] == "logit_scale":
            tensor.clamp_(max=MAX_LOGIT_SCALE)
