"""The leading singular vectors of a large matrix, without decomposing all of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_MAX_PASSES = 20
_MAX_DEGREE = 12
_TOLERANCE = 1e-5

Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""U `[out, k]`, singular values `[k]` falling, V `[in, k]`: the matrix is U diag(S) V^T."""


def extra_columns(rank: int) -> int:
    """How many more columns than asked for the randomised solver works with.

    With few, a flat spectrum takes many more passes; with many, each pass costs more.
    """
    return max(16, rank)


def leading_triplets(
    chain: Sequence[torch.Tensor], rank: int, generator: torch.Generator
) -> Triplets | None:
    """The `rank` largest singular triplets of a product of matrices, or None if out of reach.

    A randomised range finder (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4
    and 5.1), with Chebyshev polynomials of W W^T where they use powers (Zhou and Saad 2007, A
    Chebyshev-Davidson algorithm): the polynomial is small on the part of the spectrum that is to
    go and grows fastest beyond it, which is what makes a flat spectrum affordable.

    `chain` is (W,) or (B, A) with W = B A: `[out, R]`, `[R, in]`. A pass costs a few products
    with a thin block of rank + `extra_columns` columns. Passes end when Wedin's bound puts the
    angle to the true singular space at 1e-5 or below, or at the rounding of the dtype. Where
    sigma_r and sigma_(r+1) are close, float32 cannot tell them apart from W itself; so the last
    rotation inside the block is done in float64. None means that 20 passes did not suffice.
    """
    out, inner = chain[0].shape[0], chain[-1].shape[1]
    work = _cheapest(chain)
    columns = min(rank + extra_columns(rank), out, inner)
    start = torch.randn(inner, columns, generator=generator, device=generator.device)
    block = _apply(work, start.to(work[0]))
    unit = torch.finfo(block.dtype).eps
    for _ in range(_MAX_PASSES):
        basis = torch.linalg.qr(block).Q  # [out, columns]
        u, s, v = _rotate(work, basis)
        image = _apply(work, v)
        residuals = (image - u * s).norm(dim=0)
        # Without a column beyond the rank asked for, all of W is in the block.
        gap = s[rank - 1] - s[rank] if columns > rank else s[rank - 1]
        found = residuals <= max(_TOLERANCE * gap, unit * math.sqrt(max(out, inner)) * s[0])
        if found[:rank].all():
            u, s, v = _rotate([m.double() for m in chain], basis.double())
            return tuple(t[..., :rank].to(block.dtype) for t in (u, s, v))  # type: ignore[return-value]
        known = int(found[:rank].cumprod(0).sum())
        block = _filter(work, u, image * s, known)
    return None


def _cheapest(chain: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The product itself where it has fewer entries than its factors."""
    out, inner = chain[0].shape[0], chain[-1].shape[1]
    if len(chain) > 1 and out * inner <= sum(m.numel() for m in chain):
        return [torch.linalg.multi_dot(list(chain))]
    return chain


def _apply(chain: Sequence[torch.Tensor], block: torch.Tensor) -> torch.Tensor:
    for matrix in reversed(chain):
        block = matrix @ block
    return block


def _apply_transposed(chain: Sequence[torch.Tensor], block: torch.Tensor) -> torch.Tensor:
    for matrix in chain:
        block = matrix.T @ block
    return block


def _rotate(chain: Sequence[torch.Tensor], basis: torch.Tensor) -> Triplets:
    """Singular triplets of W restricted to the span of `basis` on the left (Rayleigh-Ritz)."""
    v, s, wh = torch.linalg.svd(_apply_transposed(chain, basis), full_matrices=False)
    return basis @ wh.T, s, v


def _filter(
    chain: Sequence[torch.Tensor], u: torch.Tensor, once: torch.Tensor, known: int
) -> torch.Tensor:
    """A Chebyshev polynomial of W W^T applied to u; `once` is W W^T u.

    The polynomial stays within [-1, 1] below the smallest value in the block. The first `known`
    columns are right already: they stay as they are and are kept out of the others. The degree is
    so low that the others do not all turn into the first of them before the next QR.
    """
    fixed, previous, image = u[:, :known], u[:, known:], once[:, known:]
    unit = torch.finfo(u.dtype).eps
    squares = image.norm(dim=0)  # eigenvalues of W W^T, nearly
    top = squares.max()
    half = float((squares.min() / top).clamp(min=unit**2, max=1.0)) / 2  # of the cut, top = 1
    growth = math.acosh(max(1 / half - 1, 1 + unit))
    degree = min(_MAX_DEGREE, max(1, int(-math.log(unit) / 2 / growth)))
    current = image / (top * half) - previous
    for _ in range(degree - 1):
        current = current - fixed @ (fixed.T @ current)
        product = _apply(chain, _apply_transposed(chain, current)) / (top * half)
        previous, current = current, 2 * (product - current) - previous
    return torch.cat([fixed, current / current.norm()], dim=1)
