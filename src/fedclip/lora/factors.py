"""One low-rank matrix B A: norms, singular vectors, other ranks, without forming out x in."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch

from fedclip.lora.randomized_svd import Triplets, extra_columns, leading_triplets

Solver = Literal["auto", "exact", "randomised"]


class Factors(NamedTuple):
    """A `[r, in]` and B `[out, r]` of the matrix B A `[out, in]`."""

    a: torch.Tensor
    b: torch.Tensor

    def product(self) -> torch.Tensor:
        """B A, dense: `[out, in]`, as a linear layer's weight has it."""
        return self.b @ self.a


def with_magnitudes(weight: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """A weight `[out, in]` whose rows have the norms `magnitudes` `[out]`.

    DoRA's weight, of W + s B A: Liu et al. 2024, arXiv:2402.09353, equation 5.
    """
    return weight * (magnitudes / weight.norm(dim=1))[:, None]


def inner(x: Factors, y: Factors) -> torch.Tensor:
    """Frobenius inner product <B_x A_x, B_y A_y> = sum((B_x^T B_y) * (A_x A_y^T)), a scalar."""
    return ((x.b.T @ y.b) * (x.a @ y.a.T)).sum()


def norm(x: Factors) -> torch.Tensor:
    """Frobenius norm of B A, a scalar.

    From inner products, so a product that nearly cancels, |B A| << |B| |A|, has a norm of no
    better relative precision than the square root of the dtype's.
    """
    return inner(x, x).clamp(min=0).sqrt()


def svd(x: Factors) -> Triplets:
    """U `[out, k]`, S `[k]`, V `[in, k]` of B A, k = min(r, out, in), in O((out + in) r^2).

    QR of B and of A^T, then the SVD of the small core R_b R_a^T.
    """
    q_b, r_b = torch.linalg.qr(x.b)
    q_a, r_a = torch.linalg.qr(x.a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, q_a @ vh.T


def leading_svd(
    x: Factors | torch.Tensor,
    rank: int,
    *,
    solver: Solver = "auto",
    generator: torch.Generator | None = None,
) -> Triplets:
    """The `rank` largest singular triplets (fewer where there are fewer) of B A or a dense matrix.

    "exact" decomposes everything: of factors the core of `svd`, of at most min(r, out, in) rows.
    "randomised" is `subspace.leading_triplets`, for r in the hundreds, as when the factors of many
    clients are stacked: nearly as exact, the seed of `generator` matters in the last digits only,
    and where it does not converge, "exact" takes over. "auto" is randomised where that is quicker:
    for cores of more than 8 times the columns that the randomised solver works with.

    The largest entry of each column of U is positive. Raises ValueError for a rank below 1, an
    unknown solver, or if a generator is needed and missing.
    """
    chain = (x.b, x.a) if isinstance(x, Factors) else (x,)
    size = min(min(matrix.shape) for matrix in chain)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if solver not in ("auto", "exact", "randomised"):
        raise ValueError(f"solver must be auto, exact or randomised, got {solver!r}")
    rank = min(rank, size)
    columns = rank + extra_columns(rank)
    found = None
    if solver == "randomised" or (solver == "auto" and size > 8 * columns):
        if generator is None:
            raise ValueError("the randomised solver needs a generator, seeded by the caller")
        found = leading_triplets(chain, rank, generator)
    u, s, v = found or _exact(x)
    u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    peaks = u.gather(0, u.abs().argmax(dim=0, keepdim=True))  # [1, rank]
    signs = torch.where(peaks < 0, -1, 1).to(u.dtype)
    return u * signs, s, v * signs


def _exact(x: Factors | torch.Tensor) -> Triplets:
    if isinstance(x, Factors):
        return svd(x)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u, s, vh.T


def truncate(
    x: Factors | torch.Tensor,
    rank: int,
    *,
    scaling: float = 1.0,
    solver: Solver = "auto",
    generator: torch.Generator | None = None,
) -> Factors:
    """The rank-`rank` adapter whose scaling * B A is nearest to x (Eckart and Young 1936).

    The squared error is the sum of the squared singular values left out. All singular values go
    into B, so that A has orthonormal rows (FlexLoRA, Bai et al. 2024, arXiv:2402.11505). Where x
    has fewer than `rank` triplets, both factors are padded with zeros. `solver` and `generator`
    are those of `leading_svd`.
    """
    u, s, v = leading_svd(x, rank, solver=solver, generator=generator)
    return resize(Factors(v.T, u * (s / positive(scaling, "scaling"))), rank)


def orthonormal_rows(x: Factors) -> Factors:
    """The same B A with orthonormal rows in A: B = U S, A = V^T of its SVD.

    FedSVD (Lee et al. 2025, arXiv:2505.12805), which bounds the gradient of B by that of the
    layer's output. A's rows are orthonormal even where B A has a lower rank, or is zero. Raises
    ValueError where r exceeds out or in.
    """
    rank = x.a.shape[0]
    if rank > min(x.a.shape[1], x.b.shape[0]):
        raise ValueError(
            f"rank {rank} exceeds a side of the layer, {x.b.shape[0]} x {x.a.shape[1]}"
        )
    u, s, v = leading_svd(x, rank, solver="exact")
    return Factors(v.T, u * s)


def ordered_rows(x: Factors) -> Factors:
    """The same B A, its first rows holding the most: the first k are the nearest adapter of rank k.

    The singular values are shared evenly between both factors, but no row of A is made shorter
    than the rows of A are by their mean square: else a small product, as after a first round,
    would leave B hardly any gradient. Where r exceeds a side of the layer, the rows beyond are
    zero in both factors.
    """
    u, s, v = svd(x)
    lengths = s.sqrt().clamp(min=x.a.square().sum(dim=1).mean().sqrt())
    if not bool(lengths[0] > 0):
        return x
    return resize(Factors(v.T * lengths[:, None], u * (s / lengths)), x.a.shape[0])


def resize(x: Factors, rank: int) -> Factors:
    """The first `rank` rows of A and columns of B, or zeros after those there are.

    HetLoRA's truncation and padding (Cho et al. 2024, arXiv:2401.06432). Padding leaves the
    product as it is; cutting keeps what stands first, which is the best only if rows are ordered.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    missing = max(0, rank - x.a.shape[0])
    a, b = x.a[:rank], x.b[:, :rank]
    if not missing:
        return Factors(a, b)
    rows, columns = a.new_zeros(missing, a.shape[1]), b.new_zeros(b.shape[0], missing)
    return Factors(torch.cat([a, rows]), torch.cat([b, columns], dim=1))


def set_rank(x: Factors, rank: int, *, generator: torch.Generator) -> Factors:
    """A layer's adapter at another rank, B A kept as closely as the rank allows.

    Up, it is kept: new rows of A are drawn as those of a fresh adapter, uniform within
    1 / sqrt(in), and new columns of B are zero. Down, it is the nearest of that rank (`truncate`).
    """
    old = x.a.shape[0]
    if rank < old:
        return truncate(x, rank, solver="exact")
    bound = 1 / math.sqrt(x.a.shape[1])
    rows = torch.rand(rank - old, x.a.shape[1], generator=generator, device=generator.device)
    return Factors(torch.cat([x.a, ((2 * rows - 1) * bound).to(x.a)]), resize(x, rank).b)


def singular_frame(
    estimate: Factors | torch.Tensor,
    rank: int,
    *,
    scaling: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Factors, torch.Tensor]:
    """Fixed factors and the first core R `[rank, rank]` of an adapter scaling * B R A.

    B = U_r, A = V_r^T and R = diag(S_r) / scaling of an estimate of the first full update, dense
    `[out, in]` or in factors (LoRA-SB, Ponkshe et al. 2024, arXiv:2411.19557, on which Fed-SB
    stands, Singhal et al. 2025, arXiv:2502.15436). Raises ValueError where the estimate has fewer
    than `rank` singular triplets.
    """
    u, s, v = leading_svd(estimate, rank, generator=generator)
    if len(s) < rank:
        raise ValueError(f"an estimate of {len(s)} singular values cannot give rank {rank}")
    return Factors(v.T, u), torch.diag(s / positive(scaling, "scaling"))


def positive(value: float, name: str) -> float:
    """The value, or ValueError if it is not a positive number."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value}")
    return value
