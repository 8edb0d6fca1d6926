"""One CLIP with the adapters of many clients side by side, applied in one pass.

The images of all clients lie one after another as rows. What every client shares is computed once
for all rows, and what is frozen below the first adapted layer needs no gradient, no second
computation, and can be kept (`frozen`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from fedclip.lora.layer_patterns import PROJECTIONS
from fedclip.lora.names import pair_of
from fedclip.models.dropout import counted, keep_scale, kept
from fedclip.models.peft_lora import dropout_of, lora_layers, scaling_of, tower_of
from fedclip.models.stacked.beside import Beside
from fedclip.models.stacked.low_rank_linear import Factors, Mask
from fedclip.models.stacked.towers import NO_ADAPTERS, Adapters, Tower, read_tower
from fedclip.models.text_head import ensemble
from fedclip.models.wrapper import CLIPLoRAWrapper

State = Mapping[str, torch.Tensor]
VISION, TEXT = "vision_encoder", "text_encoder"
Prompts = tuple[tuple[str, ...], tuple[str, ...]]  # class names and templates


class StackedClients:
    """The forward pass of several clients at once, on the weights of one wrapped CLIP."""

    def __init__(self, model: CLIPLoRAWrapper, *, products: torch.dtype | None = None) -> None:
        """`products` is the data type of matrix products, by default that of the weights."""
        assert model.kind.unstacked is None
        model.require_unmerged("StackedClients")
        self._model = model
        # The layers themselves: their ranks, and with these their scaling, may change later on.
        self._layers = lora_layers(model.network)
        self._products = products
        self._vision, self._text = self._towers()
        self._text_is_trained = model.head == "text" and any(
            tower_of(name) == TEXT for name in self._layers
        )
        self._prompts: dict[Prompts, tuple[torch.Tensor, torch.Tensor]] = {}
        self._shifts = 0
        self._beside = Beside(model.device)
        self._projects = "visual_projection" in self._layers
        self.frozen_layers = self._vision.first_adapted(list(self._layers))
        self.device = model.device

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the tensors that get gradients: a linear head leaves the text tower idle."""
        idle = self._model.head == "linear"
        names = self._model.trainable()
        return tuple(n for n in names if not (idle and tower_of(n) == TEXT))

    def set_shift(self, shift: State) -> None:
        """Adds a change `[out, in]` to frozen weights, by layer."""
        if not shift and not self._model.is_shifted():
            return
        self._model.set_shift(shift)
        self._vision, self._text = self._towers()
        self._prompts.clear()
        self._shifts += 1

    @property
    def version(self) -> tuple[float, ...]:
        """As long as it is the same, a captured pass over the frozen weights still holds."""
        return self._shifts, *map(scaling_of, self._layers.values())

    def scales(self, ranks: Sequence[int]) -> torch.Tensor:
        """What clients of these ranks multiply their updates with, `[clients, layers]`."""
        rows = [[scaling_of(layer, rank) for layer in self._layers.values()] for rank in ranks]
        return torch.tensor(rows, dtype=torch.float64)

    @torch.no_grad()
    def frozen(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the layers below the first adapted one make of uint8 pixels `[rows, 3, size, size]`.

        Hidden states `[rows, tokens, width]`; where the encoder has no adapted layer, embeddings
        `[rows, dim]`, or `[rows, width]` if the projection is adapted. `logits` takes any of these
        in the place of the pixels.
        """
        vision = self._model.clip.vision_model
        pixels = self._model.normalised(pixels)
        short = self._products not in (None, self._model.dtype)
        with torch.autocast(self.device.type, dtype=self._products, enabled=short):
            embedded = vision.embeddings(pixels)
        hidden = vision.pre_layrnorm(embedded.to(self._model.dtype))
        hidden = self._vision.prefix(hidden, self.frozen_layers)
        if self.frozen_layers < len(self._vision.layers):
            return hidden
        normal = self._vision.norm(hidden[:, 0])
        return normal if self._projects else self._vision.projected(normal, NO_ADAPTERS)

    def logits(
        self,
        state: State,
        inputs: torch.Tensor,
        counts: Sequence[int],
        keys: Sequence[int] | torch.Tensor,
        scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits `[rows, classes]` of pixels, or of what `frozen` made of them.

        `state` holds the trained tensors with a leading client axis. `counts` says how many rows
        are each client's; where they are fewer than there are rows, every client has equally many
        and the rest of its own is padding. `keys` fixes each client's dropout; as a tensor it
        fixes masks that the device computes (`counted`). `scales` are those of the clients' ranks,
        where they may be lower than the layers'.
        """
        clients = len(counts)
        each = None if sum(counts) < len(inputs) else counts
        texts = None
        if self._text_is_trained:
            texts = self._beside.run(
                lambda: self._text_features(self._factors(state, scales, TEXT), clients, keys)
            )
        hidden = (self.frozen(inputs) if inputs.dim() == 4 else inputs).to(self._model.dtype)
        padded = len(inputs) // clients if each is None else None
        factors = self._factors(state, scales, VISION)
        adapters = self._adapters(factors, each, counts, keys, padded)
        embedded = self._images(hidden, self._vision, adapters)
        if self._model.head == "linear":
            weight, bias = state["head.weight"], state["head.bias"]
            return _by_client(embedded, weight, each) + _repeated(bias, each, len(embedded))
        images = F.normalize(embedded, dim=-1)
        scale = self._model.clip.logit_scale.exp()
        if texts is None:
            return scale * images @ self._model.text_features().T
        self._beside.join()
        return scale * _by_client(images, texts, each)

    def merged(self, state: State) -> MergedClassifier:
        """A classifier with one client's tensors folded into the weights, for evaluation."""
        with torch.no_grad():
            stacked = {name: tensor.to(self.device)[None] for name, tensor in state.items()}
            return MergedClassifier(self, stacked)

    # --- inside ---

    def _towers(self) -> tuple[Tower, Tower]:
        clip = self._model.clip
        vision = read_tower(clip, VISION, self._products)
        return vision, read_tower(clip, TEXT, self._products)

    def _factors(self, state: State, scales: torch.Tensor | None, tower: str) -> dict[str, Factors]:
        """A and scaled B of a tower's layers, in the format of the products."""
        products = self._vision.layers[0].linear["q_proj"].weight.dtype
        found = {}
        for index, (path, layer) in enumerate(self._layers.items()):
            if tower_of(path) != tower or not all(name in state for name in pair_of(path)):
                continue  # idle: a linear head does not use the text tower
            down, up = (state[name] for name in pair_of(path))
            if scales is None:
                scaled = up * scaling_of(layer)
            else:
                scaled = up * scales[:, index, None, None].to(up)
            dtype = self._model.dtype if path in PROJECTIONS.values() else products
            found[path] = Factors(down.to(dtype), scaled.to(dtype))
        return found

    def _adapters(
        self,
        factors: Mapping[str, Factors],
        each: Sequence[int] | None,
        counts: Sequence[int],
        keys: Sequence[int] | torch.Tensor,
        padded: int | None,
    ) -> Adapters:
        """The updates with each client's dropout as it would be drawn for its rows alone."""

        def draw(layer: str, shape: torch.Size) -> Mask | None:
            p = dropout_of(self._layers[layer])
            if p == 0.0 or not len(keys):
                return None
            if isinstance(keys, torch.Tensor):
                rows = shape[0] // len(keys)
                mask = counted(torch.Size((rows, *shape[1:])), p, keys, layer)
                return Mask(mask, keep_scale(p))
            masks = []
            for count, key in zip(counts, keys, strict=True):
                mask = kept(torch.Size((count, *shape[1:])), p, key, layer, self.device)
                masks.append(mask)
                if padded is not None:
                    masks.append(mask.new_zeros(padded - count, *shape[1:]))
            return Mask(torch.cat(masks), keep_scale(p))

        return Adapters(factors, each, draw)

    def _images(self, hidden: torch.Tensor, tower: Tower, adapters: Adapters) -> torch.Tensor:
        """Image embeddings `[rows, dim]` of what `frozen` made, by one or many clients' tower."""
        if hidden.dim() == 2:
            return tower.projected(hidden, adapters) if self._projects else hidden
        pooled = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        first = self.frozen_layers
        hidden = tower.encode(hidden, adapters, first=first, pooled=pooled)
        return tower.embed(hidden, adapters)

    def _text_features(
        self,
        factors: Mapping[str, Factors],
        clients: int,
        keys: Sequence[int] | torch.Tensor,
        tower: Tower | None = None,
    ) -> torch.Tensor:
        """Features `[clients, classes, dim]`, every prompt once per client, one after another."""
        first = self._text.first_adapted(list(self._layers))
        hidden, ends = self._frozen_prompts(first)
        prompts = len(hidden)
        adapters = self._adapters(factors, None, [prompts] * clients, keys, None)
        rows = hidden.expand(clients, *hidden.shape).flatten(0, 1)
        tower = tower or self._text
        pooled = tower.encode(rows, adapters, first=first, pooled=ends.repeat(clients))
        features = F.normalize(tower.embed(pooled, adapters), dim=-1)
        classes = len(self._model.class_names)
        return ensemble(features, clients * classes).unflatten(0, (clients, -1))

    @torch.no_grad()
    def _frozen_prompts(self, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the frozen layers make of the prompts, computed once, and where each one ends."""
        head = self._model.text_head
        known = (head.class_names, head.templates)  # of several tasks, each has its own
        if known not in self._prompts:
            ids, ends = head.prompt_ids()
            embedded = self._model.clip.text_model.embeddings(input_ids=ids.to(self.device))
            self._prompts[known] = self._text.prefix(embedded, first), ends.to(self.device)
        return self._prompts[known]


class MergedClassifier:
    """Images to logits with an adapter added to the weights: one matrix product a layer."""

    def __init__(self, stacked: StackedClients, state: State) -> None:
        """Takes the trained tensors with a leading axis of one."""
        self._model = stacked._model
        self._stacked = stacked
        self._vision = stacked._vision.merged(stacked._factors(state, None, VISION))
        self._head = state.get("head.weight"), state.get("head.bias")
        if self._model.head == "linear":
            self._texts = None
        elif stacked._text_is_trained:
            text = stacked._text.merged(stacked._factors(state, None, TEXT))
            self._texts = stacked._text_features({}, 1, (), text)[0]
        else:
            self._texts = self._model.text_features()

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, classes]` of pixels, or of what `StackedClients.frozen` made of them."""
        embedded = self._embed(inputs)
        if self._texts is None:
            weight, bias = self._head
            assert weight is not None
            assert bias is not None
            return F.linear(embedded, weight[0], bias[0])
        return self._model.clip.logit_scale.exp() * F.normalize(embedded, dim=-1) @ self._texts.T

    def eval(self) -> None:
        """Nothing to do: there is no dropout."""

    def _embed(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.dim() == 4:
            inputs = self._stacked.frozen(inputs)
        return self._stacked._images(inputs.to(self._model.dtype), self._vision, NO_ADAPTERS)


def _by_client(
    rows: torch.Tensor, matrices: torch.Tensor, counts: Sequence[int] | None
) -> torch.Tensor:
    """Each client's rows `[rows, dim]` times its matrix `[classes, dim]`, transposed."""
    if counts is None or len(set(counts)) == 1:
        stacked = rows.unflatten(0, (len(matrices), -1))
        return (stacked @ matrices.transpose(1, 2)).flatten(0, 1)
    parts = zip(rows.split(list(counts)), matrices, strict=True)
    return torch.cat([mine @ matrix.T for mine, matrix in parts])


def _repeated(vectors: torch.Tensor, counts: Sequence[int] | None, rows: int) -> torch.Tensor:
    """Expand per-client vectors `[clients, classes]` to the clients' rows: `[rows, classes]`."""
    repeats = counts or [rows // len(vectors)] * len(vectors)
    if len(set(repeats)) == 1:
        return vectors.repeat_interleave(repeats[0], dim=0)
    return vectors.repeat_interleave(torch.tensor(repeats, device=vectors.device), dim=0)
