"""What saving, loading and describing an adapter need of the model that holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fedclip.models.lora_settings import LoraSettings
    from fedclip.records import State


class AdapterHost(Protocol):
    """A model whose trainable tensors can be read, replaced and described."""

    base_name: str
    lora: LoraSettings | None
    head: str | None
    classifier: nn.Linear | None
    network: nn.Module

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; empty when only their number is known."""
        ...

    @property
    def templates(self) -> tuple[str, ...]:
        """Prompt templates of the text classifier."""
        ...

    def trainable(self) -> dict[str, nn.Parameter]:
        """Live trainable tensors by name."""
        ...

    def get_parameters(self) -> dict[str, torch.Tensor]:
        """Copies of the trainable tensors, fp32 on the CPU."""
        ...

    def set_parameters(self, state: Mapping[str, Any]) -> None:
        """Replace the trainable tensors; a misfit raises and changes nothing."""
        ...

    def set_classes(
        self, class_names: Sequence[str], templates: Sequence[str] | None = None
    ) -> None:
        """Name the classes."""
        ...

    def adopt_ranks(self, config: Mapping[str, Any], state: State) -> None:
        """Take over ranks and scales of a PEFT configuration, and factors."""
        ...

    def unmerged(self) -> AbstractContextManager[None]:
        """Inside, the adapter stands beside the weights."""
        ...
