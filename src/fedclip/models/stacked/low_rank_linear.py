"""Linear layers with a shared frozen weight and one low-rank update per client.

The rows of all clients lie one after another. The shared weight is one matrix product for all of
them; each client's update `s B_k A_k x` is added in place by small products. One function treats
all projections of one input (a layer's queries, keys and values), so that the input is kept once
and its gradient is summed without copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fedclip.models.stacked.frozen_matmul import times_transposed

QUICK_GELU = 1.702


class Factors(NamedTuple):
    """One adapted layer: A `[clients, r, in]` and B `[clients, out, r]`, B times its scaling."""

    down: torch.Tensor
    up: torch.Tensor


class Shared(NamedTuple):
    """A frozen linear layer: weight `[out, in]` and bias `[out]`, which may be missing."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class Mask(NamedTuple):
    """Dropout of one layer's input: True where kept, and what is kept is multiplied with."""

    kept: torch.Tensor
    scale: float


def project(
    x: torch.Tensor,
    shared: Sequence[Shared],
    factors: Sequence[Factors | None],
    counts: Sequence[int] | None,
    masks: Sequence[Mask | None] = (),
) -> tuple[torch.Tensor, ...]:
    """Outputs `[rows, ..., out]` of several layers that read the same `x` `[rows, ..., in]`.

    `counts` says how many of the rows are each client's, in order; None means equally many.
    `masks` are in the shape of `x` and concern the input of the update alone.
    """
    inner = x.shape[1:-1].numel()
    sizes = None if counts is None or _equal(counts) else [count * inner for count in counts]
    flat = x.reshape(-1, x.shape[-1])
    present = [pair is not None for pair in factors]
    tensors = [t for pair in factors if pair is not None for t in pair]
    kept = [
        None if m is None else m.kept.reshape(flat.shape) for m in masks or [None] * len(shared)
    ]
    scales = [1.0 if m is None else m.scale for m in masks or [None] * len(shared)]
    outputs = _Project.apply(flat, sizes, list(shared), present, kept, scales, *tensors)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


class _Project(torch.autograd.Function):
    """The forward and backward passes written out, on flat rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        sizes: list[int] | None,
        shared: list[Shared],
        present: list[bool],
        masks: list[torch.Tensor | None],
        scales: list[float],
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        pairs = _pairs(present, tensors)
        outputs, inner = [], []
        for layer, pair, mask, scale in zip(shared, pairs, masks, scales, strict=True):
            y = times_transposed(x, *layer)
            if pair is not None:
                dropped = x if mask is None else (x * mask).mul_(scale)
                h = _rows_times(dropped, pair.down.transpose(1, 2), sizes)  # [rows, r]
                _add_rows_times(y, h, pair.up.transpose(1, 2), sizes)
                inner.append(h)
            outputs.append(y)
        ctx.sizes, ctx.shared, ctx.present, ctx.scales = sizes, shared, present, scales
        ctx.masked = [mask is not None for mask in masks]
        kept = [mask for mask in masks if mask is not None]
        ctx.save_for_backward(x if any(present) else x.new_empty(0), *kept, *inner, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        count = sum(ctx.present)
        kept, rest = rest[: sum(ctx.masked)], rest[sum(ctx.masked) :]
        inner, pairs = iter(rest[:count]), _pairs(ctx.present, rest[count:])
        kept_masks = iter(kept)
        masks = [next(kept_masks) if masked else None for masked in ctx.masked]
        wants_x = ctx.needs_input_grad[0]
        x_grad: torch.Tensor | None = None
        factor_grads: list[torch.Tensor] = []
        layers = zip(grads, ctx.shared, pairs, masks, ctx.scales, strict=True)
        for g, layer, pair, mask, scale in layers:
            g = g.contiguous()
            if wants_x:
                x_grad = times_transposed(g, layer.weight.t(), x_grad)
            if pair is None:
                continue
            dropped = x if mask is None else (x * mask).mul_(scale)
            h_grad = _rows_times(g, pair.up, ctx.sizes)  # [rows, r]
            clients = len(pair.up)
            factor_grads.append(_outer(h_grad, dropped, clients, ctx.sizes))
            factor_grads.append(_outer(g, next(inner), clients, ctx.sizes))
            if x_grad is not None and mask is None:
                _add_rows_times(x_grad, h_grad, pair.down, ctx.sizes)
            elif x_grad is not None and mask is not None:
                back = _rows_times(h_grad, pair.down, ctx.sizes).mul_(mask).mul_(scale)
                x_grad.add_(back)
        return x_grad, None, None, None, None, None, *factor_grads


def _pairs(present: Sequence[bool], tensors: Sequence[torch.Tensor]) -> list[Factors | None]:
    found = iter(tensors)
    return [Factors(next(found), next(found)) if there else None for there in present]


def _equal(counts: Sequence[int]) -> bool:
    return all(count == counts[0] for count in counts)


def _rows_times(x: torch.Tensor, matrices: torch.Tensor, sizes: list[int] | None) -> torch.Tensor:
    """Each client's rows of x `[rows, a]` times its matrix `[a, b]`: `[rows, b]`."""
    if x.device.type == "cpu" and matrices.shape[-1] < matrices.shape[-2]:
        # Thin: much faster with its columns end to end.
        matrices = matrices.transpose(1, 2).contiguous().transpose(1, 2)
    if sizes is None:
        return torch.bmm(x.view(len(matrices), -1, x.shape[-1]), matrices).flatten(0, 1)
    y = x.new_empty(len(x), matrices.shape[-1])
    for mine, out, matrix in zip(x.split(sizes), y.split(sizes), matrices, strict=True):
        torch.mm(mine, matrix, out=out)
    return y


def _add_rows_times(
    y: torch.Tensor, x: torch.Tensor, matrices: torch.Tensor, sizes: list[int] | None
) -> None:
    """Adds each client's rows of x `[rows, a]` times its matrix `[a, b]` to y `[rows, b]`."""
    if sizes is None:
        clients = len(matrices)
        stacked = x.view(clients, -1, x.shape[-1])
        y.view(clients, -1, y.shape[-1]).baddbmm_(stacked, matrices)
        return
    for mine, out, matrix in zip(x.split(sizes), y.split(sizes), matrices, strict=True):
        out.addmm_(mine, matrix)


def _outer(g: torch.Tensor, x: torch.Tensor, clients: int, sizes: list[int] | None) -> torch.Tensor:
    """Each client's `g^T x` over its rows: `[clients, a, b]` of g `[rows, a]` and x `[rows, b]`."""
    if g.shape[-1] > x.shape[-1]:  # much faster with the thin one on the left
        return _outer(x, g, clients, sizes).transpose(1, 2)
    if sizes is None:
        stacked = g.view(clients, -1, g.shape[-1]).transpose(1, 2)
        return torch.bmm(stacked, x.view(clients, -1, x.shape[-1]))
    rows = zip(g.split(sizes), x.split(sizes), strict=True)
    return torch.stack([mine.t() @ theirs for mine, theirs in rows])


def mlp(x: torch.Tensor, wide: Shared, narrow: Shared) -> torch.Tensor:
    """CLIP's feed-forward block `[..., width]`: frozen layers around `z * sigmoid(1.702 z)`."""
    y = _Mlp.apply(x.reshape(-1, x.shape[-1]), wide, narrow)
    return y.view(x.shape)


class _Mlp(torch.autograd.Function):
    """With u = 1.702 z the activation is silu(u) / 1.702, and both factors ride on the products.

    Only u is kept for the backward pass, in which the factors cancel.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, wide: Shared, narrow: Shared) -> torch.Tensor:
        bias = None if wide.bias is None else wide.bias * QUICK_GELU
        u = times_transposed(x, wide.weight, bias, factor=QUICK_GELU)
        ctx.wide, ctx.narrow = wide, narrow
        ctx.save_for_backward(u)
        return times_transposed(F.silu(u), *narrow, factor=1 / QUICK_GELU)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        (u,) = ctx.saved_tensors
        back = times_transposed(g.contiguous(), ctx.narrow.weight.t())
        inner = torch.ops.aten.silu_backward(back, u)
        return times_transposed(inner, ctx.wide.weight.t()), None, None
