"""How the LoRA updates of a cohort combine, for one layer: exact means and their approximations.

The update of client i is s_i B_i A_i, and what all methods look for is the exact mean
sum_i p_i s_i B_i A_i with p_i = weight_i / sum of weights. Averaging A and B each on its own is
not that. Where a function returns an adapter, `scaling` is what its receiver multiplies with: the
result stands for scaling * B A. Clients of different ranks are padded with zeros, which
changes no product. Arithmetic is done in the factors' dtype, float32 or float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedclip.lora.factors import Factors, Solver, positive, truncate


@dataclass(frozen=True)
class StackedLora:
    """A layer's updates, stacked: A `[clients, r, in]`, B `[clients, out, r]`.

    `weights` `[clients]` are any positive numbers, such as examples; `scalings` `[clients]` are
    lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA, where r is the client's own rank before
    padding. Raises ValueError if shapes disagree (nothing is ever broadcast), if a weight or
    scaling is not positive, or for half precision, in which sums would lose digits: convert first.
    """

    a: torch.Tensor
    b: torch.Tensor
    weights: torch.Tensor
    scalings: torch.Tensor

    def __post_init__(self) -> None:
        a, b = tuple(self.a.shape), tuple(self.b.shape)
        if len(a) != 3 or len(b) != 3 or a[0] != b[0] or a[1] != b[2] or a[0] == 0:
            raise ValueError(f"A [clients, r, in] and B [clients, out, r] do not fit: {a} and {b}")
        if self.a.dtype != self.b.dtype or self.a.dtype not in (torch.float32, torch.float64):
            types = f"{self.a.dtype} and {self.b.dtype}"
            raise ValueError(f"A and B must both be float32 or both float64, got {types}")
        _check_positive("weights", self.weights, clients=a[0])
        _check_positive("scalings", self.scalings, clients=a[0])

    @property
    def shares(self) -> torch.Tensor:
        """p `[clients]`, the weights made to sum to 1, in float64."""
        return _shares(self.weights).to(self.a.device)

    def scaled_b(self, scaling: float) -> torch.Tensor:
        """B_i s_i / scaling: what a receiver with that scaling needs for B. `[clients, out, r]`."""
        ratios = self.scalings.to(self.a.device, torch.float64) / positive(scaling, "scaling")
        return self.b * _column(ratios, self.b)


def stack(x: StackedLora, *, scaling: float = 1.0, ranks: Sequence[int] | None = None) -> Factors:
    """The exact mean in factors: A = [A_1; ...; A_K], B = [p_1 s_1 B_1, ...] / scaling.

    FLoRA (Wang et al. 2024, arXiv:2409.05976). The share stands on one side only: on both it would
    enter squared. Shapes `[sum of ranks, in]` and `[out, sum of ranks]`; `ranks`
    `[clients]` drops the padding, without it the sum is clients * r.
    """
    b = x.scaled_b(scaling) * _column(x.shares, x.b)
    rows = x.a.flatten(0, 1)  # [clients * r, in]
    columns = b.permute(1, 0, 2).flatten(1)  # [out, clients * r]
    if ranks is None:
        return Factors(rows, columns)
    held = _held(x, ranks).flatten()
    return Factors(rows[held], columns[:, held])


def truncated_mean(
    x: StackedLora,
    rank: int,
    *,
    scaling: float = 1.0,
    solver: Solver = "auto",
    generator: torch.Generator | None = None,
) -> Factors:
    """The adapter of rank `rank` nearest to the exact mean.

    FlexLoRA (Bai et al. 2024, arXiv:2402.11505): SVD of sum_i p_i s_i B_i A_i, cut at the rank. A
    client of lower rank takes `resize` of it. For K r up to a few hundred it costs
    O((out + in) (K r)^2); beyond that a randomised solver takes over. See `low_rank.truncate`.
    """
    return truncate(stack(x), rank, scaling=scaling, solver=solver, generator=generator)


def mean_of_factors(x: StackedLora, *, scaling: float) -> Factors:
    """A = sum_i p_i A_i and B = sum_i p_i (s_i / scaling) B_i, which is not the exact mean.

    FedIT (Zhang et al. 2023, arXiv:2305.05644); with padded ranks, zero-padding averaging. The
    exact mean lies `residual` away. A factor that all clients share comes out bit for bit.
    """
    return Factors(_mean(x.a, x.shares), _mean(x.scaled_b(scaling), x.shares))


def residual(x: StackedLora, *, scaling: float) -> Factors:
    """What the mean of factors misses: exact mean - scaling * Bbar Abar, in factors.

    FedEx-LoRA (Singhal et al. 2024, arXiv:2410.09432) adds it to the base weight.
    It is the covariance of the factors, scaling * sum_i p_i (B_i - Bbar)(A_i - Abar), with B_i
    scaled as in `mean_of_factors`. As sum_i p_i (B_i - Bbar) = 0, the last client's A may stand in
    for Abar and its term falls away: shapes `[(K - 1) r, in]`, `[out, (K - 1) r]`, none for K = 1.
    """
    b = x.scaled_b(scaling)
    deviations = b[:-1] - _mean(b, x.shares)
    deviations = deviations * _column(x.shares[:-1] * scaling, b)
    return Factors(
        (x.a[:-1] - x.a[-1]).flatten(0, 1),
        deviations.permute(1, 0, 2).flatten(1),
    )


def corrected_mean(x: StackedLora, *, scaling: float, ridge: float) -> Factors:
    """The mean of factors with B moved towards the exact mean: A = Abar, B = Bbar + D.

    LoRA-FAIR (Bian et al. 2024, arXiv:2411.14961) seeks D by gradient steps on a cosine
    similarity with a penalty; here the distance is the squared one, whose minimum
    |M - (Bbar + D) Abar|^2 + w |D|^2, M = exact mean / scaling, is closed:
    D = (M - Bbar Abar) Abar^T (Abar Abar^T + w I)^-1. The weight w is `ridge` times the mean
    eigenvalue of Abar Abar^T, trace / r, so that it means the same for an A of any size: along an
    eigenvalue of that mean, D is 1 / (1 + ridge) of the unregularised one. 0 gives the best B for
    Abar, the smallest one where Abar lacks rank. Raises ValueError for a negative ridge.
    """
    if not ridge >= 0:
        raise ValueError(f"ridge must not be negative, got {ridge}")
    mean, missed = mean_of_factors(x, scaling=scaling), residual(x, scaling=scaling)
    gram = mean.a @ mean.a.T  # [r, r]
    weight = ridge * gram.trace() / len(gram)
    inverse = torch.linalg.pinv(gram + weight * torch.eye(len(gram)).to(gram), hermitian=True)
    correction = missed.b @ (missed.a @ mean.a.T) / scaling @ inverse  # [out, r]
    return Factors(mean.a, mean.b + correction)


def owner_mean(
    x: StackedLora, ranks: Sequence[int], *, scaling: float, kept: Factors | None = None
) -> Factors:
    """`mean_of_factors` where row j is averaged over the clients of rank above j only.

    Plain averaging of padded factors shrinks rows that few clients hold; this does not (RBLA, Chen
    et al. 2024, arXiv:2408.08699). `ranks` `[clients]`. A row that nobody holds is that of `kept`,
    or zero.
    """
    shares = x.shares[:, None] * _held(x, ranks)  # [clients, r]
    totals = shares.sum(dim=0)
    shares = (shares / totals.where(totals > 0, torch.ones_like(totals))).to(x.a.dtype)
    a = torch.einsum("kr,kri->ri", shares, x.a)
    b = torch.einsum("kr,kor->or", shares, x.scaled_b(scaling))
    if kept is None:
        return Factors(a, b)
    return Factors(torch.where(totals[:, None] > 0, a, kept.a), torch.where(totals > 0, b, kept.b))


def among_owners(x: StackedLora, ranks: Sequence[int]) -> StackedLora:
    """The updates with row j weighing as in a mean over the clients of rank above j only.

    In the exact mean of padded updates, directions that few clients hold shrink from round to
    round, and the energy gathers in the least rank (rank collapse; weighing each part of the
    ranks by its owners is raFLoRA, arXiv:2602.13486). `ranks` `[clients]`. B carries the factor.
    """
    own = _held(x, ranks)
    totals = (x.shares[:, None] * own).sum(dim=0)  # [r]
    factors = torch.where(own, 1 / totals.clamp(min=torch.finfo(totals.dtype).tiny), 0.0)
    return replace(x, b=x.b * factors[:, None, :].to(x.b.dtype))


def gram(x: StackedLora) -> torch.Tensor:
    """Inner products of the updates, <s_i B_i A_i, s_j B_j A_j>, `[clients, clients]`.

    sum((B_i^T B_j) * (A_i A_j^T)) for each pair, by two products of all factors at once. Unlike
    distances between factors, they do not change when a client sends (B G, G^-1 A) for (B, A).
    """
    clients, rank = x.a.shape[:2]
    columns = x.scaled_b(1.0).transpose(1, 2).flatten(0, 1)  # B^T of all, [clients * r, out]
    rows = x.a.flatten(0, 1)
    products = (columns @ columns.T) * (rows @ rows.T)
    return products.view(clients, rank, clients, rank).sum(dim=(1, 3))


def update_norms(x: StackedLora) -> torch.Tensor:
    """Frobenius norms of the updates, |s_i B_i A_i|, `[clients]`: the root of `gram`'s diagonal."""
    b = x.scaled_b(1.0)
    squares = ((b.transpose(1, 2) @ b) * (x.a @ x.a.transpose(1, 2))).sum(dim=(1, 2))
    return squares.clamp(min=0).sqrt()


def norm_weights(norms: torch.Tensor) -> torch.Tensor:
    """Shares in proportion to the norms of the updates, `[clients]`; equal if all are zero.

    HetLoRA's weights (Cho et al. 2024, arXiv:2401.06432). For an adapter of several
    layers, give the root of the sum of `update_norms` squared.
    """
    total = norms.sum()
    return norms / total if total > 0 else torch.full_like(norms, 1 / len(norms))


def _check_positive(name: str, values: torch.Tensor, clients: int) -> None:
    if tuple(values.shape) != (clients,):
        raise ValueError(f"{name}: {tuple(values.shape)} for {clients} clients")
    if not bool((torch.isfinite(values) & (values > 0)).all()):
        raise ValueError(f"{name} must be positive numbers, got {values.tolist()}")


def _shares(weights: torch.Tensor) -> torch.Tensor:
    return weights.double() / weights.double().sum()


def _column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.to(like)[:, None, None]


def _mean(stacked: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Taken from the first client on, so that the mean of equal tensors is that tensor exactly."""
    first = stacked[0]
    return first + torch.tensordot(shares.to(stacked), stacked - first, dims=1)


def _held(x: StackedLora, ranks: Sequence[int]) -> torch.Tensor:
    """Which rows a client holds, bool `[clients, r]`."""
    clients, rank = x.a.shape[:2]
    if len(ranks) != clients or not all(1 <= r <= rank for r in ranks):
        raise ValueError(f"ranks of {clients} clients must be from 1 to {rank}, got {list(ranks)}")
    return torch.arange(rank, device=x.a.device) < torch.tensor(ranks, device=x.a.device)[:, None]
