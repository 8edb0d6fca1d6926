"""From a configuration to a model: the door of this folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedclip.config import ModelConfig
from fedclip.config.loading import validate_model
from fedclip.models.pretrained import load_base
from fedclip.models.state import adapter_sha256
from fedclip.models.trainable import trainable_of
from fedclip.models.wrapper import CLIPLoRAWrapper

__all__ = ["CLIPLoRAWrapper", "adapter_sha256", "create_clip_model"]


def create_clip_model(
    config: Mapping[str, Any] | ModelConfig,
    *,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    seed: int = 0,
) -> CLIPLoRAWrapper:
    """Build a CLIP with LoRA from the `model` part of a configuration, on the CPU.

    `class_names` and prompt `templates` make the text classifier; without them `num_classes`
    makes a linear one, and with neither the model gives features only, until `set_classes`. `seed`
    decides all that is drawn: the adapter's start, a linear head, random base weights; sites that
    train together use the same. Raises `UsageError` for what a user can mend.

    The model is a `torch.nn.Module` in evaluation mode; call `train()` before training. Its `head`
    is "text", "linear" or None, its `base_name` and `image_size` are those of the base.
    """
    if not isinstance(config, ModelConfig):
        config = validate_model(config, "create_clip_model")
    return CLIPLoRAWrapper(
        load_base(config.model_name, seed=seed),
        kind=trainable_of(config),
        head=config.head,
        num_classes=config.num_classes,
        class_names=class_names,
        templates=templates,
        gradient_checkpointing=config.gradient_checkpointing,
        seed=seed,
    )
