"""An adapter on disk as its layers' updates, apart from any model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from fedclip.errors import UsageError
from fedclip.lora.factors import Factors, with_magnitudes
from fedclip.lora.layer_patterns import first_hit
from fedclip.lora.names import layers_in, magnitude_of, pair_of
from fedclip.models.adapter_folder import check_base, read_adapter, write_adapter
from fedclip.models.adapter_notes import AdapterNotes
from fedclip.models.lora_settings import scaling
from fedclip.models.peft_lora import base_parameters
from fedclip.models.pretrained import load_base
from fedclip.models.state import adapter_sha256, checked_state
from fedclip.models.trainable import KINDS
from fedclip.models.trainable.full import FullFineTuning
from fedclip.models.wrapper import CLIPLoRAWrapper


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter: A and B by the layer's path, B times the layer's scaling.

    `head` holds a trained head's tensors, `config` is PEFT's configuration. `magnitudes` are
    DoRA's, by the layer's path; of another adapter there are none.
    """

    folder: Path
    notes: AdapterNotes
    config: Mapping[str, Any]
    layers: Mapping[str, Factors]
    head: Mapping[str, torch.Tensor]
    magnitudes: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(len(a) for a, _ in self.layers.values())


def read_lora(folder: Path) -> LoraAdapter:
    """Read an adapter folder, of whatever rank, also with ranks and scales by layer."""
    tensors, notes, config = read_adapter(folder)
    if config is None or config.get("peft_type") != "LORA":
        kind = notes.kind.title if config is None else f"a {config.get('peft_type')}"
        raise UsageError(f"{folder} holds {kind}, expected a LoRA adapter")
    paths = layers_in(tensors)
    lengths = {magnitude_of(path): path for path in paths} if config.get("use_dora") else {}
    known = {name for path in paths for name in pair_of(path)} | lengths.keys()
    strange = [n for n in tensors if n not in known and not n.startswith("head.")]
    if strange or not known or known - tensors.keys():
        named = [*strange, *sorted(known - tensors.keys()), "none"][0]
        raise UsageError(f"the adapter in {folder} does not hold one A and B by layer ({named})")
    layers = {}
    for path in paths:
        a, b = (tensors[name].float() for name in pair_of(path))
        if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1]:
            raise UsageError(
                f"the adapter in {folder}: A and B of {path} do not fit, "
                f"{list(a.shape)} and {list(b.shape)}"
            )
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise UsageError(f"the adapter in {folder}: {path} holds values that are not finite")
        layers[path] = Factors(a, b * _scaling(config, path, len(a), folder))
    head = {name: t.float() for name, t in tensors.items() if name not in known}
    magnitudes = {path: tensors[name].float() for name, path in lengths.items()}
    for path, lengths_of in magnitudes.items():
        if lengths_of.shape != layers[path].b.shape[:1] or not bool(lengths_of.isfinite().all()):
            raise UsageError(f"the adapter in {folder}: the magnitudes of {path} do not fit it")
    return LoraAdapter(folder, notes, config, layers, head, magnitudes)


def write_lora(folder: Path, adapter: LoraAdapter) -> None:
    """Write an adapter whose layers all have one rank, as an adapter of scaling 1."""
    state = dict(adapter.head)
    for path, pair in adapter.layers.items():
        # Owned: safetensors takes no views, and a file depends on no memory layout.
        for name, factor in zip(pair_of(path), pair, strict=True):
            state[name] = factor.to(torch.float32).contiguous().clone()
    own = {"r": adapter.rank, "lora_alpha": adapter.rank, "use_rslora": False}
    config = {**adapter.config, **own, "rank_pattern": {}, "alpha_pattern": {}}
    write_adapter(folder, state, adapter.notes, config)


def open_adapter(
    folder: str | PathLike[str], *, base_model: str | None = None, seed: int = 0
) -> CLIPLoRAWrapper:
    """A model without adapter whose weights hold what an adapter folder holds, its head among it.

    The folder may hold any kind of what is trained, an adapter of whatever rank. The base
    is the one that the folder names, or the same under the name `base_model`; `seed` is that of its
    random weights.
    """
    folder = Path(folder)
    tensors, notes, config = read_adapter(folder)
    base = load_base(base_model or notes.base_model, seed=seed)
    own = adapter_sha256(base_parameters(base.model))
    linear = notes.head == "linear"
    model = CLIPLoRAWrapper(
        base,
        kind=KINDS[notes.trained]() if config is None else FullFineTuning(),
        head=notes.head or "auto",
        num_classes=len(tensors["head.bias"]) if linear and "head.bias" in tensors else None,
        class_names=notes.class_names or None,
        templates=notes.templates or None,
    )
    if config is None:
        model.load_adapter(folder)
        return model
    check_base(folder, notes, base_model=base.name, base_sha256=own)
    adapter = read_lora(folder)
    put_layers(model, adapter)
    return model


@torch.no_grad()
def put_layers(model: CLIPLoRAWrapper, adapter: LoraAdapter) -> None:
    """Add an adapter's updates to the weights of a model without adapter, and put its head in."""
    weights = layer_weights(model, adapter)
    for path, (a, b) in adapter.layers.items():
        weights[path].add_((b @ a).to(weights[path]))
        if path in adapter.magnitudes:
            lengths = adapter.magnitudes[path].to(weights[path])
            weights[path].copy_(with_magnitudes(weights[path], lengths))
    put_head(model, adapter)
    model.text_head.forget()


def put_head(model: CLIPLoRAWrapper, adapter: LoraAdapter) -> None:
    """Put a trained head, if there is one, in the place of the model's."""
    if model.classifier is None:
        return
    own = {f"head.{name}": value for name, value in model.classifier.state_dict().items()}
    source = f"the adapter in {adapter.folder}"
    head = checked_state(adapter.head, own, source=source)
    model.classifier.load_state_dict({n.removeprefix("head."): t for n, t in head.items()})


def layer_weights(model: CLIPLoRAWrapper, adapter: LoraAdapter) -> dict[str, torch.Tensor]:
    """The weights `[out, in]` that an adapter's layers change, checked to be there and to fit."""
    found = base_parameters(model.network)
    for path, (a, b) in adapter.layers.items():
        there = found.get(f"{path}.weight")
        if there is None or tuple(there.shape) != (len(b), a.shape[1]):
            has = "no such layer" if there is None else f"one of shape {list(there.shape)}"
            raise UsageError(
                f"the adapter in {adapter.folder} changes {path}, a layer of shape "
                f"{[len(b), a.shape[1]]}; the model has {has}"
            )
    return {path: found[f"{path}.weight"] for path in adapter.layers}


def _scaling(config: Mapping[str, Any], path: str, rank: int, folder: Path) -> float:
    """What PEFT multiplies a layer's B A with."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise UsageError(f"the adapter in {folder}: alpha_pattern must be a mapping: {patterns!r}")
    try:
        alpha = first_hit(patterns, path, config.get("lora_alpha"))
    except ValueError as error:  # a pattern that is no regular expression
        raise UsageError(f"the adapter in {folder}: alpha_pattern: {error}") from None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UsageError(f"the adapter in {folder}: lora_alpha must be a number, got {alpha!r}")
    return scaling(alpha, rank, bool(config.get("use_rslora")))
