"""Kinds of what is trained on a CLIP beside its head: one file and one row each."""

from __future__ import annotations

from collections.abc import Mapping

from fedclip.config import ModelConfig
from fedclip.models.protocols import Trainable
from fedclip.models.trainable.full import FullFineTuning
from fedclip.models.trainable.head import HeadAlone
from fedclip.models.trainable.lora import Lora

KINDS: Mapping[str, type[Trainable]] = {
    kind.name: kind for kind in (FullFineTuning, Lora, HeadAlone)
}


def trainable_of(config: ModelConfig) -> Trainable:
    """What a configuration asks to train."""
    return KINDS[config.trains].of(config)
