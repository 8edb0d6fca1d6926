"""The product of many rows with a frozen matrix, by oneDNN where it can do it.

On a CPU torch gives fp32 products to MKL, which leaves AVX-512 unused on processors that are not
Intel's. oneDNN, which torch carries as well, uses it there, and is then twice as fast.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch


def times_transposed(
    x: torch.Tensor,
    weight: torch.Tensor,
    plus: torch.Tensor | None = None,
    *,
    factor: float = 1.0,
) -> torch.Tensor:
    """`factor x W^T + plus` `[rows, out]` of x `[rows, in]` and W `[out, in]`, which may be a view.

    `plus` is a bias `[out]` or of the result's shape; the latter may be overwritten. For the
    passes of autograd functions: there is no gradient, and autocast is not heeded.
    """
    if not _onednn_computes(x, weight):
        if plus is None:
            y = x @ weight.t()
            return y if factor == 1.0 else y.mul_(factor)
        add = plus.addmm_ if plus.dim() == 2 else partial(torch.addmm, plus)
        return add(x, weight.t(), alpha=factor)
    if factor == 1.0:
        return _by_onednn(x, weight, plus)
    if len(weight) > weight.shape[1]:  # the factor goes to the narrower side
        return _by_onednn(x * factor, weight, plus)
    return _by_onednn(x, weight, None if plus is None else plus / factor).mul_(factor)


def _find_onednn() -> Any:
    """oneDNN's linear layer; None where this torch is without it, or has it in another form."""
    try:
        linear = torch.ops.mkldnn._linear_pointwise
        one = torch.ones(2, 2, dtype=torch.float32, device="cpu")
        linear.binary(linear(one, one, one[0], "none", [], ""), one, one.t(), None, "add")
    except (AttributeError, RuntimeError, TypeError):
        return None
    return linear


_linear = _find_onednn()


def _onednn_computes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        _linear is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.is_contiguous()
        and len(x) > 0
    )


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, plus: torch.Tensor | None) -> torch.Tensor:
    if plus is None or plus.dim() == 1:
        return _linear(x, weight, plus, "none", [], "")
    return _linear.binary(x, plus, weight, None, "add")
