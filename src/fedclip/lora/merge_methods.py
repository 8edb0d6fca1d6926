"""How trained adapters are merged into one, layer by layer.

Here a layer's update is D_i = B_i A_i, with the adapter's scaling already in B_i, and w_i are
weights as the user gives them: they need not sum to 1. Arithmetic is done in the factors' dtype.

| method | D | weights by default |
|---|---|---|
| linear | (sum_i w_i B_i)(sum_i p_i A_i), p_i = w_i / sum of weights | 1 / K |
| cat, svd | sum_i w_i D_i, in full; cut at a rank | 1 / K |
| task-arithmetic | the same cut, with weights found on validation data | 0.4 |
| ties | mean of w_i trim(D_i) over those whose sign is the elected one | 1 |
| dare | sum_i w_i m_i * D_i / density, m_i a random mask | 1 / K |
| knots | U times ties of S V_i^T, where [D_1 ... D_K] = U S [V_1^T ... V_K^T] | 1 |

`linear` is FedIT's mean of factors (Zhang et al. 2023, arXiv:2305.05644), `cat` FLoRA's stacking
(Wang et al. 2024, arXiv:2409.05976), `svd` FlexLoRA (Bai et al. 2024, arXiv:2402.11505). Task
arithmetic: Ilharco et al. 2022, arXiv:2212.04089. TIES: Yadav et al. 2023, arXiv:2306.01708; a
layer is trimmed on its own. DARE: Yu et al. 2023, arXiv:2311.03099. KnOTS: Stoica et al. 2024,
arXiv:2410.19735.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fedclip.catalog import MERGE_METHODS, target_of
from fedclip.lora.factors import Factors, norm, resize, svd, truncate


class Merged(NamedTuple):
    """A layer's merged update in factors, and squared norms: what was kept, and all there was."""

    factors: Factors
    kept: float
    total: float


@dataclass(frozen=True)
class Method:
    """A way to merge.

    `combine` takes updates, weights, density and a generator, and gives factors or a dense
    matrix. `cut` says whether that is cut at a rank, `same_rank` whether the updates must have one
    rank. `density` is the default share of entries that stay, None where all do.
    """

    combine: Callable[
        [Sequence[Factors], Sequence[float], float, torch.Generator], Factors | torch.Tensor
    ]
    weight: Callable[[int], float]
    cut: bool = True
    same_rank: bool = False
    density: float | None = None


def merge_layer(
    method: Method,
    updates: Sequence[Factors],
    weights: Sequence[float],
    *,
    rank: int,
    density: float,
    generator: torch.Generator,
) -> Merged:
    """One layer's updates as one of rank `rank`.

    Where the method cuts, it is the nearest update of that rank (`low_rank.truncate`), else it is
    padded with zeros to that rank.
    """
    combined = method.combine(updates, weights, density, generator)
    total = float(combined.norm() if isinstance(combined, torch.Tensor) else norm(combined)) ** 2
    if not method.cut:
        assert not isinstance(combined, torch.Tensor)
        return Merged(resize(combined, rank), total, total)
    cut = truncate(combined, rank, generator=generator)
    # A's rows are orthonormal where B's columns are not zero.
    return Merged(cut, min(total, float(cut.b.norm()) ** 2), total)


def mean_of_factors(updates: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """A = sum_i p_i A_i and B = sum_i w_i B_i. Weights must sum to more than 0."""
    w = torch.tensor(weights, dtype=updates[0].a.dtype, device=updates[0].a.device)
    a, b = (torch.stack([x[side] for x in updates]) for side in (0, 1))
    return Factors(torch.tensordot(w / w.sum(), a, dims=1), torch.tensordot(w, b, dims=1))


def stacked(updates: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The exact sum_i w_i D_i: A = [A_1; ...; A_K], B = [w_1 B_1, ..., w_K B_K]."""
    return Factors(
        torch.cat([x.a for x in updates]),
        torch.cat([w * x.b for w, x in zip(weights, updates, strict=True)], dim=1),
    )


def ties(matrices: torch.Tensor, weights: Sequence[float], density: float) -> torch.Tensor:
    """TIES: trim, elect a sign, and average the values that agree: `[K, ...]` to `[...]`.

    An entry's elected sign is that of the sum over the trimmed matrices, and + for a sum of 0.
    """
    trimmed = torch.stack([trim(matrix, density) for matrix in matrices])
    elected = torch.where(trimmed.sum(dim=0) >= 0, 1, -1)
    agree = trimmed.sign() == elected  # an entry that was trimmed has no sign
    shares = torch.tensor(weights, dtype=trimmed.dtype, device=trimmed.device)
    shares = shares.view(-1, *[1] * (trimmed.dim() - 1))
    return (shares * trimmed * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def trim(matrix: torch.Tensor, density: float) -> torch.Tensor:
    """The share `density` of the entries that are largest in magnitude, and zeros for the rest."""
    flat = matrix.flatten()
    count = max(1, int(density * flat.numel()))
    kept = flat.abs().topk(count).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(matrix)


def dare(
    updates: Sequence[Factors],
    weights: Sequence[float],
    density: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """sum_i w_i m_i * D_i / density, whose expectation is sum_i w_i D_i; dense."""
    total = torch.zeros(len(updates[0].b), updates[0].a.shape[1]).to(updates[0].b)
    for weight, update in zip(weights, updates, strict=True):
        mask = torch.rand(total.shape, generator=generator) < density
        total += weight / density * update.product() * mask.to(total.device)
    return total


def knots(updates: Sequence[Factors], weights: Sequence[float], density: float) -> Factors:
    """TIES in the directions that the updates have in common.

    [D_1 ... D_K] = B blockdiag(A_1, ..., A_K) is decomposed in factors; each update is then U times
    its block S V_i^T `[k, in]`, and the blocks are merged.
    """
    concatenated = Factors(
        torch.block_diag(*(x.a for x in updates)), torch.cat([x.b for x in updates], dim=1)
    )
    u, s, v = svd(concatenated)
    noise = s[0] * max(len(u), len(v)) * torch.finfo(s.dtype).eps
    real = max(1, int((s > noise).sum()))  # directions of rounding alone would be trimmed with it
    blocks = (v[:, :real] * s[:real]).T.chunk(len(updates), dim=1)  # [k, in] each
    return Factors(ties(torch.stack(blocks), weights, density), u[:, :real])


def _share(count: int) -> float:
    return 1 / count


LINEAR = Method(
    lambda x, w, density, draw: mean_of_factors(x, w), _share, cut=False, same_rank=True
)
CAT = Method(lambda x, w, density, draw: stacked(x, w), _share, cut=False)
SVD = Method(lambda x, w, density, draw: stacked(x, w), _share)
TASK_ARITHMETIC = Method(lambda x, w, density, draw: stacked(x, w), lambda count: 0.4)
TIES = Method(
    lambda x, w, density, draw: ties(torch.stack([u.product() for u in x]), w, density),
    lambda count: 1.0,
    density=0.2,
)
DARE = Method(dare, _share, density=0.5)
KNOTS = Method(lambda x, w, density, draw: knots(x, w, density), lambda count: 1.0, density=0.2)

METHODS: dict[str, Method] = {n: target_of(row.target) for n, row in MERGE_METHODS.items()}
