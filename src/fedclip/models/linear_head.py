"""A trained linear classifier on the projected image embedding."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import nn

from fedclip.errors import FedclipWarning
from fedclip.models.peft_lora import tower_of
from fedclip.seeding import seed_for


def new_classifier(width: int, count: int, *, seed: int) -> nn.Linear:
    """A layer from `width` features to `count` classes: small seeded weights, bias zero.

    The weights are not zero, as the adapter would then get no gradient in the first step.
    """
    layer = nn.utils.skip_init(nn.Linear, width, count)
    generator = torch.Generator().manual_seed(seed_for(seed, "head"))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(count, width, generator=generator) / math.sqrt(width))
        layer.bias.zero_()
    return layer


def warn_of_idle_text(trained: Iterable[str]) -> None:
    """Warn where an adapter trains text-tower tensors, which a linear classifier never uses."""
    if any(tower_of(name) == "text_encoder" for name in trained):
        warnings.warn(
            "model.lora.target_modules.text_encoder: the linear classifier does not use the text "
            "tower, so its adapter is made and sent but gets no gradient; give class names for a "
            "text classifier, or leave text_encoder out",
            FedclipWarning,
            stacklevel=2,
        )


def head_parameters(classifier: nn.Linear | None) -> dict[str, nn.Parameter]:
    """A classifier's live parameters, named as in `head.safetensors`; none of none."""
    own = classifier.named_parameters() if classifier is not None else ()
    return {f"head.{name}": parameter for name, parameter in own}
