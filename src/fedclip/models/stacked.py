"""One CLIP with the adapters of many clients side by side, applied in one pass.

With a batch of clients' images laid end to end, the shared weight is one matrix product for all,
and each client's low-rank update two small batched ones:
`y = W x + s B_k A_k x` for the rows of client k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from fedclip.models.dropout import keep_mask
from fedclip.models.lora import TOWERS, factor_names, lora_layers, scaling_of
from fedclip.models.wrapper import CLIPLoRAWrapper

State = Mapping[str, torch.Tensor]


class StackedLinear(nn.Module):
    """A frozen linear layer with one LoRA update per client.

    Takes `[clients * rows, ..., in_features]`, the clients' rows one after another.
    """

    def __init__(self, base: nn.Linear, scaling: float, dropout: float, layer: str) -> None:
        super().__init__()
        self.base = base
        self._scaling = scaling
        self._dropout = dropout
        self._layer = layer
        self.down = torch.empty(0)  # A of all clients, [clients, r, in]
        self.up = torch.empty(0)  # B of all clients, [clients, out, r]
        self.keys: Sequence[int] = ()
        self.counts: Sequence[int] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output with each client's update added to its rows."""
        y = self.base(x)
        clients = len(self.down)
        rows = self._dropped(x).reshape(clients, -1, x.shape[-1])  # [clients, rows * tokens, in]
        update = torch.bmm(torch.bmm(rows, self.down.transpose(1, 2)), self.up.transpose(1, 2))
        return y + self._scaling * update.view_as(y)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        """Each client's own mask, as it would be drawn for its rows alone; padding is zeroed."""
        if not self.training or self._dropout == 0.0:
            return x
        per_client = len(x) // len(self.keys)
        mask = x.new_zeros(len(self.keys), per_client, *x.shape[1:])
        for client, key in enumerate(self.keys):
            count = per_client if self.counts is None else self.counts[client]
            shape = torch.Size((count, *x.shape[1:]))
            mask[client, :count] = keep_mask(shape, self._dropout, key, self._layer, x.device)
        return x * mask.view_as(x)


class StackedClients:
    """The forward pass of several clients at once, on the weights of one wrapped CLIP."""

    def __init__(self, model: CLIPLoRAWrapper) -> None:
        self._model = model
        self._layers: dict[str, StackedLinear] = {}
        self._originals: dict[str, nn.Module] = {}
        assert model.lora is not None
        for layer, module in lora_layers(model.network).items():
            self._originals[layer] = cast(nn.Module, module)
            base = cast(nn.Linear, module.get_base_layer())
            self._layers[layer] = StackedLinear(
                base, scaling_of(module), model.lora.lora_dropout, layer
            )
        self._text_is_trained = any(TOWERS["text_encoder"] in layer for layer in self._layers)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the wrapped CLIP's adapted layers are the stacked ones."""
        self._put(self._layers)
        self._model.train()
        try:
            yield
        finally:
            self._put(self._originals)
            for module in self._layers.values():  # let the last group's tensors go
                module.down = module.up = torch.empty(0)

    def logits(
        self, state: State, pixels: torch.Tensor, counts: Sequence[int], keys: Sequence[int]
    ) -> torch.Tensor:
        """Logits `[clients, batch, classes]` of pixels `[clients, batch, 3, size, size]`.

        `state` holds the trainable tensors with a leading client axis; `counts` says how many of
        each client's images are real (the rest is padding) and `keys` fixes dropout.
        """
        clients = len(pixels)
        for layer, module in self._layers.items():
            down, up = factor_names(layer)
            module.down, module.up = state[down], state[up]
            module.keys = keys
            module.counts = None if TOWERS["text_encoder"] in layer else counts
        embedded = self._model.embed(pixels.flatten(0, 1)).unflatten(0, (clients, -1))
        with self._model.full_precision():
            if self._model.head == "linear":
                scores = torch.bmm(embedded, state["head.weight"].transpose(1, 2))
                return scores + state["head.bias"][:, None]
            images = F.normalize(embedded, dim=-1)
        texts = self._texts(clients)  # [clients or 1, classes, dim]
        with self._model.full_precision():
            return self._model.clip.logit_scale.exp() * images @ texts.transpose(1, 2)

    def _texts(self, clients: int) -> torch.Tensor:
        if not self._text_is_trained:
            return self._model.text_features()[None]
        return self._model.text_head.stacked_features(self._model.clip, clients)

    def _put(self, modules: Mapping[str, nn.Module]) -> None:
        for layer, module in modules.items():
            parent, _, name = layer.rpartition(".")
            setattr(self._model.clip.get_submodule(parent), name, module)
