"""What the tests of the adapter algebra share: random cohorts, and the exact mean by loops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedclip.federated.running_mean import RunningMean
from fedclip.lora.aggregate import StackedLora
from fedclip.lora.factors import Factors, resize

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}
SIDES = ((6, 9), (9, 6), (7, 7))  # out, in: like fc2, fc1 and q_proj


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weighted_mean(
    tensors: Mapping[str, torch.Tensor], weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Mean over the leading client axis by `RunningMean`: tensors `[clients, ...]`."""
    mean = RunningMean()
    mean.add(tensors, weights)
    return mean.result()


def pad(factors: Sequence[Factors]) -> Factors:
    """Adapters of different ranks stacked: A `[clients, r_max, in]`, B `[clients, out, r_max]`."""
    rank = max(x.a.shape[0] for x in factors)
    padded = [resize(x, rank) for x in factors]
    return Factors(torch.stack([x.a for x in padded]), torch.stack([x.b for x in padded]))


def cohort(
    clients: int = 3,
    out: int = 7,
    inner: int = 5,
    rank: int = 2,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    scalings: Sequence[float] | None = None,
) -> StackedLora:
    """Random factors, weights far from uniform, and a scaling of its own for each client."""
    generator = seeded(seed)
    a = torch.randn(clients, rank, inner, generator=generator, dtype=torch.float64)
    b = torch.randn(clients, out, rank, generator=generator, dtype=torch.float64)
    weights = torch.randint(1, 500, (clients,), generator=generator)
    own = [0.5 + 0.75 * i for i in range(clients)] if scalings is None else scalings
    return StackedLora(a.to(dtype), b.to(dtype), weights, torch.tensor(own, dtype=torch.float64))


def exact_mean(x: StackedLora) -> torch.Tensor:
    """sum_i p_i s_i B_i A_i, dense and client by client, in float64: `[out, in]`."""
    total = torch.zeros(x.b.shape[1], x.a.shape[2], dtype=torch.float64)
    for a, b, weight, scaling in zip(x.a, x.b, x.weights, x.scalings, strict=True):
        total += float(weight) * float(scaling) * (b.double() @ a.double())
    return total / float(x.weights.sum())


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference, relative to what was expected."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())
