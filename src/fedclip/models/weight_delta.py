"""Changes of frozen weights: an adapter merged into them, or a shift, and taken out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from fedclip.errors import UsageError
from fedclip.models.peft_lora import dense_updates, lora_layers, set_folded
from fedclip.records import State

if TYPE_CHECKING:
    from typing import Self

    from fedclip.models.protocols import Trainable
    from fedclip.models.text_head import TextHead


class ShiftedWeights:
    """The adapted layers' frozen weights, to which a change may be added."""

    def __init__(self, network: nn.Module) -> None:
        """Takes a network with adapters; nothing is copied before it is needed."""
        self._weights = {
            layer: cast(nn.Linear, module.get_base_layer()).weight
            for layer, module in lora_layers(network).items()
        }
        self._originals: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def set(self, shift: State) -> None:
        """Add each layer's change `[out, in]` to its frozen weight; restore those without one."""
        for layer, weight in self._weights.items():
            if layer in shift and layer not in self._originals:
                self._originals[layer] = weight.detach().clone()
            if layer in self._originals:
                weight.copy_(self._originals[layer])
            if layer in shift:
                weight.add_(shift[layer].to(weight))


class MergeableLora(nn.Module):
    """A model with an adapter whose frozen weights can change, and come back as they were."""

    network: nn.Module
    kind: Trainable
    text_head: TextHead
    _folded: ShiftedWeights | None = None
    _shifted: ShiftedWeights | None = None

    def is_merged(self) -> bool:
        """Whether the adapter is folded into the weights."""
        return self._folded is not None

    def merge_lora(self) -> None:
        """Fold the adapter into the weights, W + s B A: it then costs nothing to compute.

        Of DoRA the magnitudes are folded in as well. The frozen weights are kept beside, so
        `unmerge_lora` restores them bit for bit. Parameters can be read, set, saved and loaded as
        before; training and `state_dict` raise `UsageError`, and so does this where no LoRA
        adapter is trained. Merging twice is merging once.
        """
        self._require_adapter("merge_lora")
        if self._folded is None:
            self._folded = ShiftedWeights(self.network)
            self._folded.set(dense_updates(self.network))
            self._switch(folded=True)

    def unmerge_lora(self) -> None:
        """Take the adapter out of the weights again; nothing happens where it is not in them."""
        self._require_adapter("unmerge_lora")
        if self._folded is not None:
            self._folded.set({})
            self._folded = None
            self._switch(folded=False)

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """Inside, the adapter stands beside the weights; afterwards it is where it was."""
        merged = self.is_merged()
        if merged:
            self.unmerge_lora()
        try:
            yield
        finally:
            if merged:
                self.merge_lora()

    def require_unmerged(self, what: str) -> None:
        """Raise `UsageError` where an adapter in the weights is in the way of `what`."""
        if self.is_merged():
            raise UsageError(
                f"{what}: the adapter is merged into the weights, where nothing trains it; "
                "call unmerge_lora() first"
            )

    def set_shift(self, shift: State) -> None:
        """Add a change `[out, in]` to frozen weights, by layer path; `{}` takes it back."""
        self.require_unmerged("set_shift")
        if self._shifted is None:
            if not shift:
                return
            self._shifted = ShiftedWeights(self.network)
        self._shifted.set(shift)
        self.forget_texts()

    def is_shifted(self) -> bool:
        """Whether a shift was ever put on the frozen weights."""
        return self._shifted is not None

    def train(self, mode: bool = True) -> Self:
        """Switch to training, or to evaluation; a merged adapter cannot be trained."""
        if mode:
            self.require_unmerged("train")
        return super().train(mode)

    def forget_texts(self) -> None:
        """Compute text features anew, as weights have changed that are not trained."""
        self.text_head.forget()

    def _require_adapter(self, what: str) -> None:
        if not self.kind.has_factors:
            raise UsageError(
                f"{what}: this model trains {self.kind.title} ({self.kind.asked_by}); there is no "
                "adapter to fold into the weights"
            )

    def _switch(self, *, folded: bool) -> None:
        set_folded(self.network, folded)
        self.forget_texts()
