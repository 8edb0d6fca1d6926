"""What the models ask of what is trained on them, and what adapter folders ask of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import CLIPModel

    from fedclip.config import ModelConfig
    from fedclip.records import State


class Trainable(Protocol):
    """A kind of what is trained on a CLIP beside its head, and all that depends on the kind.

    `fedclip.models.trainable` has one file and one row for each: LoRA, a head alone, full
    fine-tuning. Engines, strategies and folders ask these members and never which kind it is.
    """

    name: ClassVar[str]
    """`ModelConfig.trains`, and `trained` in `fedclip.json`."""
    title: ClassVar[str]
    """What errors call it, as in "this model trains ..."."""
    heading: ClassVar[str]
    """What the card of its folder calls it."""
    asked_by: ClassVar[str]
    """The keys of a configuration that ask for it."""
    model_keys: ClassVar[dict[str, Any]]
    """The same as the `model` part of a configuration."""
    weights: ClassVar[str | None]
    """File of its tensors in an adapter folder, without the head's; None where it has none."""
    peft_format: ClassVar[bool]
    """Whether its folder is one that PEFT reads."""
    has_factors: ClassVar[bool]
    """Whether it has the factors A and B that LoRA strategies, ranks and merges work on."""
    trains_base: ClassVar[bool]
    """Whether it changes the weights that the base came with."""

    @property
    def own_ranks(self) -> bool:
        """Whether it has ranks other than a configuration's."""
        ...

    @property
    def unstacked(self) -> str | None:
        """What keeps many clients from being trained in one pass; None where nothing does."""
        ...

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """The kind with the settings of a configuration."""
        ...

    def attach(self, clip: CLIPModel, *, model_name: str, seed: int) -> nn.Module:
        """Put it on a CLIP, freeze what it leaves alone, and return the network to be run."""
        ...

    def parameters(self, network: nn.Module, *, idle_text: bool) -> dict[str, nn.Parameter]:
        """Its live tensors under the names that travel; `idle_text`: the head needs no texts."""
        ...

    def config(self, network: nn.Module) -> dict[str, Any] | None:
        """What `adapter_config.json` holds; None for a folder without one."""
        ...

    def removed(self, network: nn.Module, base: Callable[[], State]) -> AbstractContextManager[Any]:
        """Inside, the network computes what the base does, whose weights `base` gives."""
        ...

    def facts(self) -> dict[str, Any]:
        """What `get_lora_info` says of it."""
        ...


class AdapterHost(Protocol):
    """A model whose trainable tensors can be read, replaced and described."""

    base_name: str
    kind: Trainable
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
