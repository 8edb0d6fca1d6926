"""A CLIP's towers layer by layer, as functions of tensors: what the batched engine runs.

It computes what transformers' own modules compute, with three liberties: the pass may begin above
a frozen prefix, adapted layers take the low-rank updates of many clients at once, and the last
layer computes only the position that is pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPModel
from transformers.activations import ACT2FN

from fedclip.device import at_least_fp32
from fedclip.lora.layer_patterns import LAYERS, PROJECTIONS, TOWERS
from fedclip.models.stacked.low_rank_linear import Factors, Mask, Shared, mlp, project

MLP = ("fc1", "fc2")

Draw = Callable[[str, torch.Size], Mask | None]
"""Dropout by layer and shape of its input; None: nothing is dropped."""


class Norm(NamedTuple):
    """A layer normalisation: weight and bias `[width]`."""

    weight: torch.Tensor
    bias: torch.Tensor
    epsilon: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., width]`, normalised over its last axis."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.epsilon)


class Layer(NamedTuple):
    """One encoder layer: its path in the CLIP, two normalisations, and linear layers by name."""

    path: str
    norm1: Norm
    norm2: Norm
    linear: Mapping[str, Shared]

    def name(self, linear: str) -> str:
        """The path of one of its linear layers."""
        return f"{self.path}.{LAYERS[linear]}"


@dataclass(frozen=True)
class Adapters:
    """The clients' updates in one pass.

    `factors` are by the layer's path; `counts` says how many of the rows are each client's, None
    that all have equally many.
    """

    factors: Mapping[str, Factors]
    counts: Sequence[int] | None
    draw: Draw = lambda layer, shape: None


@dataclass(frozen=True)
class Tower:
    """The frozen weights of one tower, its encoder's matrices in the format of the products.

    Behind the encoder come `norm` and the layer at the path `projection_path`.
    """

    layers: tuple[Layer, ...]
    norm: Norm
    projection: Shared
    projection_path: str
    heads: int
    causal: bool
    activation: str
    checkpointing: bool = False

    def encode(
        self,
        hidden: torch.Tensor,
        adapters: Adapters,
        *,
        first: int = 0,
        pooled: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `[rows, tokens, width]` after the layers from `first` on.

        With `pooled`, the position to pool of each row `[rows]`, the result is `[rows, width]`:
        the last layer then computes nothing for the other positions.
        """

        def step(hidden: torch.Tensor, index: int) -> torch.Tensor:
            last = pooled if index == len(self.layers) - 1 else None
            given = _inputs(self.layers[index], self, adapters, hidden.shape, last)
            return encoder_layer(hidden, given)

        for index in range(first, len(self.layers)):
            if self.checkpointing and torch.is_grad_enabled():
                # Dropout is keyed: there is no random state to keep.
                hidden = checkpoint(
                    step, hidden, index, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = step(hidden, index)
        if pooled is None:
            return hidden
        return hidden[:, 0] if first < len(self.layers) else _at(hidden, pooled)[:, 0]

    def embed(self, pooled: torch.Tensor, adapters: Adapters) -> torch.Tensor:
        """Embeddings `[rows, dim]`, at least fp32, of what `encode` pooled `[rows, width]`."""
        return self.projected(self.norm(pooled), adapters)

    def projected(self, normal: torch.Tensor, adapters: Adapters) -> torch.Tensor:
        """The last step of `embed`, which alone a projection's adapter changes."""
        factors = adapters.factors.get(self.projection_path)
        mask = adapters.draw(self.projection_path, normal.shape) if factors else None
        (y,) = project(normal, [self.projection], [factors], adapters.counts, [mask])
        return at_least_fp32(y)

    def prefix(self, hidden: torch.Tensor, end: int) -> torch.Tensor:
        """Hidden states after the first `end` layers, without any update."""
        return replace(self, layers=self.layers[:end]).encode(hidden, NO_ADAPTERS)

    def merged(self, adapters: Mapping[str, Factors]) -> Tower:
        """The tower with one client's updates `[1, ...]` added to its weights."""
        return replace(
            self,
            layers=tuple(_merged(layer, adapters) for layer in self.layers),
            projection=_added(self.projection, adapters.get(self.projection_path)),
        )

    def first_adapted(self, names: Sequence[str]) -> int:
        """Index of the lowest layer that has one of these adapted layers; all, if none has."""
        adapted = [
            index
            for index, layer in enumerate(self.layers)
            if any(name.startswith(f"{layer.path}.") for name in names)
        ]
        return min(adapted, default=len(self.layers))


NO_ADAPTERS = Adapters({}, None)


class Inputs(NamedTuple):
    """What one layer's pass needs besides the hidden states.

    `factors` and `masks` are by the linear layer's short name.
    """

    layer: Layer
    tower: Tower
    factors: Mapping[str, Factors]
    masks: Mapping[str, Mask]
    counts: Sequence[int] | None
    pooled: torch.Tensor | None


def encoder_layer(x: torch.Tensor, given: Inputs) -> torch.Tensor:
    """One layer on `[rows, tokens, width]`; with `pooled`, `[rows, 1, width]` of that position."""
    layer, tower, pooled = given.layer, given.tower, given.pooled
    products = layer.linear["q_proj"].weight.dtype
    normal = layer.norm1(x).to(products)
    if pooled is None:
        q, k, v = _apply(("q_proj", "k_proj", "v_proj"), normal, given)
    else:
        k, v = _apply(("k_proj", "v_proj"), normal, given)
        (q,) = _apply(("q_proj",), _at(normal, pooled), given, pooled)
    q, k, v = (t.unflatten(-1, (tower.heads, -1)).transpose(1, 2) for t in (q, k, v))
    if tower.causal and pooled is not None:
        seen = torch.arange(x.shape[1], device=x.device) <= pooled[:, None]  # [rows, tokens]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=tower.causal)
    (out,) = _apply(("out_proj",), mixed.transpose(1, 2).flatten(2), given, pooled)
    x = (x if pooled is None else _at(x, pooled)) + out
    normal = layer.norm2(x).to(products)
    if tower.activation == "quick_gelu" and not given.factors.keys() & set(MLP):
        return x + mlp(normal, layer.linear["fc1"], layer.linear["fc2"])
    (wide,) = _apply(("fc1",), normal, given, pooled)
    (narrow,) = _apply(("fc2",), ACT2FN[tower.activation](wide), given, pooled)
    return x + narrow


def _inputs(
    layer: Layer, tower: Tower, adapters: Adapters, shape: torch.Size, pooled: torch.Tensor | None
) -> Inputs:
    """What is a layer's among the clients' updates, with masks for inputs of all its positions.

    Masks are drawn for all positions even where one is left: draws do not depend on that.
    """
    factors = {
        name: adapters.factors[layer.name(name)]
        for name in layer.linear
        if layer.name(name) in adapters.factors
    }
    masks = {}
    for name in factors:
        whole = torch.Size((*shape[:-1], layer.linear[name].weight.shape[1]))
        mask = adapters.draw(layer.name(name), whole)
        if mask is not None:
            masks[name] = mask
    return Inputs(layer, tower, factors, masks, adapters.counts, pooled)


def _apply(
    names: Sequence[str], x: torch.Tensor, given: Inputs, pooled: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Linear layers on one input, of whose positions only the pooled ones may be left."""
    masks = [given.masks.get(name) for name in names]
    if pooled is not None:
        masks = [m and m._replace(kept=_at(m.kept, pooled)) for m in masks]
    shared = [given.layer.linear[name] for name in names]
    factors = [given.factors.get(name) for name in names]
    return project(x, shared, factors, given.counts, masks)


def _at(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One position of each row: `[rows, 1, width]` of `[rows, tokens, width]`."""
    return x[torch.arange(len(x), device=x.device), positions][:, None]


def _merged(layer: Layer, adapters: Mapping[str, Factors]) -> Layer:
    found = {n: _added(own, adapters.get(layer.name(n))) for n, own in layer.linear.items()}
    return layer._replace(linear=found)


def _added(shared: Shared, pair: Factors | None) -> Shared:
    if pair is None:
        return shared
    update = pair.up[0].to(shared.weight) @ pair.down[0].to(shared.weight)
    return Shared(shared.weight + update, shared.bias)


def read_tower(clip: CLIPModel, tower: str, products: torch.dtype | None = None) -> Tower:
    """The weights of `vision_encoder` or `text_encoder`, with the matrices in `products`' format.

    Without a format the tensors are the model's own, not copies.
    """
    name = TOWERS[tower]
    encoder = clip.get_submodule(name).get_submodule("encoder")
    config: Any = encoder.config
    layers = []
    for index, module in enumerate(cast(nn.ModuleList, encoder.layers)):
        linear = {
            part: _shared(module.get_submodule(inner), products) for part, inner in LAYERS.items()
        }
        first, second = (_norm(module.get_submodule(f"layer_norm{i}")) for i in (1, 2))
        layers.append(Layer(f"{name}.encoder.layers.{index}", first, second, linear))
    last = "post_layernorm" if tower == "vision_encoder" else "final_layer_norm"
    return Tower(
        tuple(layers),
        norm=_norm(clip.get_submodule(f"{name}.{last}")),
        projection=_shared(clip.get_submodule(PROJECTIONS[tower]), None),
        projection_path=PROJECTIONS[tower],
        heads=config.num_attention_heads,
        causal=tower == "text_encoder",
        activation=config.hidden_act,
        checkpointing=any(getattr(m, "gradient_checkpointing", False) for m in encoder.modules()),
    )


def _shared(module: nn.Module, products: torch.dtype | None) -> Shared:
    base = cast(nn.Linear, module.get_base_layer() if isinstance(module, LoraLayer) else module)
    weight = base.weight.detach()
    bias = None if base.bias is None else base.bias.detach().to(products or weight.dtype)
    return Shared(weight.to(products or weight.dtype), bias)


def _norm(module: nn.Module) -> Norm:
    norm = cast(nn.LayerNorm, module)
    return Norm(norm.weight.detach(), norm.bias.detach(), norm.eps)
