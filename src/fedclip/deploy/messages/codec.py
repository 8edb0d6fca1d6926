"""Tensors as one flat array for each group of factors: A, B, head, other.

A layout says which tensors, of which shapes, at which ranks; both ends know it, so the arrays need
no names. Formats: fp32 as they are, fp16, and int8 with a scale for each rank-one component.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from fedclip.deploy.messages.envelope import BadMessage
from fedclip.lora.names import factor_of, shape_at_rank
from fedclip.records import State

Format = Literal["fp32", "fp16", "int8"]
GROUPS = ("A", "B", "head", "other")
_STEPS = 127


class Field(NamedTuple):
    """A tensor of a layout; of a factor only what is below `rank` travels, None is all."""

    name: str
    shape: tuple[int, ...]
    rank: int | None = None

    @property
    def group(self) -> str:
        """Which flat array it is in."""
        return factor_of(self.name) or ("head" if "head" in self.name else "other")

    @property
    def sent_shape(self) -> tuple[int, ...]:
        """The shape of what travels."""
        return shape_at_rank(self.name, self.shape, self.rank)

    @property
    def rows(self) -> tuple[int, int]:
        """Components, and values in each: of A its rows, of B its columns, else the first axis."""
        shape = self.sent_shape
        total = math.prod(shape)
        count = 1 if len(shape) < 2 else shape[-1] if self.group == "B" else shape[0]
        return count, total // max(1, count)


Layout = tuple[Field, ...]


def layout_of(
    state: Mapping[str, torch.Tensor],
    rank: int | None = None,
    cut: Mapping[str, int] | None = None,
) -> Layout:
    """The layout of a state's tensors, sorted by name; `cut` has ranks by name."""
    cut = cut or {}
    return tuple(
        Field(name, tuple(state[name].shape), cut.get(name, rank) if factor_of(name) else None)
        for name in sorted(state)
    )


def layout_to_json(layout: Layout) -> list[Any]:
    """A layout as lists."""
    return [[f.name, list(f.shape), f.rank] for f in layout]


def layout_from_json(value: Any) -> Layout:
    """A layout from lists; raises BadMessage."""
    try:
        fields = tuple(
            Field(str(name), tuple(map(int, shape)), None if rank is None else int(rank))
            for name, shape, rank in value
        )
    except (TypeError, ValueError, OverflowError):
        raise BadMessage("the list of tensors cannot be read") from None
    if any(size < 0 for f in fields for size in f.shape):
        raise BadMessage("the list of tensors has negative sizes")
    return fields


def digest(layout: Layout) -> str:
    """A short name of a layout: equal for equal names, shapes and ranks."""
    text = json.dumps(layout_to_json(layout), separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rank_map(layout: Layout) -> dict[str, int]:
    """How many tensors A of each rank a layout has, the rank as text."""
    ranks = sorted(f.sent_shape[0] for f in layout if f.group == "A")
    return {str(rank): ranks.count(rank) for rank in dict.fromkeys(ranks)}


def encode(
    state: State, layout: Layout, form: Format, prefix: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Flat arrays by `<prefix>/<group>`, and the tensors as the other end will read them.

    Where the format rounds, the difference of those to `state` is what gets lost.
    """
    arrays: dict[str, torch.Tensor] = {}
    for group in GROUPS:
        fields = [f for f in layout if f.group == group]
        if not fields:
            continue
        parts = [_sent(f, state[f.name].detach().cpu().float()) for f in fields]
        if form == "int8":
            scaled = [_rounded(f, part) for f, part in zip(fields, parts, strict=True)]
            arrays[f"{prefix}/{group}"] = torch.cat([steps for steps, _ in scaled])
            arrays[f"{prefix}/{group}.scale"] = torch.cat([scale for _, scale in scaled])
        else:
            flat = torch.cat([part.reshape(-1) for part in parts])
            arrays[f"{prefix}/{group}"] = flat if form == "fp32" else _half(flat)
    return arrays, decode(arrays, layout, form, prefix)


def decode(
    arrays: Mapping[str, torch.Tensor], layout: Layout, form: Format, prefix: str
) -> dict[str, torch.Tensor]:
    """Tensors of a layout, zero beyond their ranks; raises BadMessage if they do not fit."""
    found: dict[str, torch.Tensor] = {}
    for group in GROUPS:
        fields = [f for f in layout if f.group == group]
        if not fields:
            continue
        sizes = [math.prod(f.sent_shape) for f in fields]
        flat = _array(arrays, f"{prefix}/{group}", form, sum(sizes))
        scales: Sequence[torch.Tensor] = [flat] * len(fields)
        if form == "int8":
            counts = [f.rows[0] for f in fields]
            flat_scale = _array(arrays, f"{prefix}/{group}.scale", "fp32", sum(counts))
            scales = flat_scale.split(counts)
        for f, part, scale in zip(fields, flat.split(sizes), scales, strict=True):
            values = _scaled(f, part, scale) if form == "int8" else part.float()
            found[f.name] = _whole(f, values.reshape(f.sent_shape))
    return {f.name: found[f.name] for f in layout}


def _array(arrays: Mapping[str, torch.Tensor], name: str, form: Format, size: int) -> torch.Tensor:
    array = arrays.get(name)
    wanted = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}[form]
    if array is None or array.dtype != wanted or array.dim() != 1 or len(array) != size:
        came = "nothing" if array is None else f"{list(array.shape)} in {_short(array.dtype)}"
        raise BadMessage(f"{name}: {size} values in {_short(wanted)} were expected, got {came}")
    return array


def _rounded(f: Field, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole steps in [-127, 127], and the length of one for each component."""
    rows = _by_component(f, part)
    scale = rows.abs().amax(dim=1) / _STEPS if rows.numel() else rows.new_zeros(len(rows))
    steps = torch.where(scale[:, None] > 0, rows / scale[:, None], torch.zeros(()))
    steps = steps.nan_to_num(0.0).round().clamp(-_STEPS, _STEPS)  # a scale says what is not finite
    return steps.to(torch.int8).reshape(-1), scale


def _scaled(f: Field, steps: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rows = steps.reshape(f.rows).float() * scale[:, None]
    return rows.T.contiguous() if f.group == "B" and len(f.sent_shape) > 1 else rows


def _by_component(f: Field, part: torch.Tensor) -> torch.Tensor:
    """`[components, values]`."""
    if f.group == "B" and part.dim() > 1:
        return part.reshape(-1, part.shape[-1]).T
    return part.reshape(f.rows)


def _half(flat: torch.Tensor) -> torch.Tensor:
    largest = torch.finfo(torch.float16).max
    return torch.where(flat.isfinite(), flat.clamp(-largest, largest), flat).half()


def _sent(f: Field, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[tuple(slice(size) for size in f.sent_shape)]


def _whole(f: Field, part: torch.Tensor) -> torch.Tensor:
    if f.sent_shape == f.shape:
        return part
    whole = torch.zeros(f.shape)
    whole[tuple(slice(size) for size in f.sent_shape)] = part
    return whole


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
