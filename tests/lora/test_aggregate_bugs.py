"""Mistakes that public code for federated LoRA has made; each test fails with its bug."""

from __future__ import annotations

import math

import torch

from fedclip.lora import aggregate as algebra
from fedclip.lora.aggregate import StackedLora
from fedclip.lora.factors import Factors, truncate
from tests.support.algebra import cohort, distance, exact_mean, pad, seeded


def test_the_residual_stands_as_the_weight_does() -> None:
    # Square, so that a transposed residual would have the right shape.
    x = cohort(3, 6, 6)
    weight = torch.randn(6, 6, generator=seeded(1), dtype=torch.float64)
    layer = torch.nn.Linear(6, 6, bias=False, dtype=torch.float64)
    mean, missed = algebra.mean_of_factors(x, scaling=0.5), algebra.residual(x, scaling=0.5)
    inputs = torch.randn(4, 6, generator=seeded(2), dtype=torch.float64)
    expected = inputs @ (weight + exact_mean(x)).T

    def outputs(correction: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            layer.weight.copy_(weight + correction)
            return layer(inputs) + 0.5 * (inputs @ mean.a.T) @ mean.b.T

    assert distance(outputs(missed.product()), expected) <= 1e-12
    assert distance(outputs(missed.product().T), expected) > 0.1


def test_a_clients_share_enters_once() -> None:
    # Equal clients: shares on both factors would give a third of the update.
    a, b = cohort(1).a, cohort(1).b
    x = StackedLora(a.expand(3, 2, 5), b.expand(3, 7, 2), torch.ones(3), torch.ones(3))
    assert distance(algebra.stack(x).product(), (b @ a)[0]) <= 1e-12
    # Square roots on both factors are as bad for the mean of factors: 3 times too much.
    assert distance(algebra.mean_of_factors(x, scaling=1.0).product(), (b @ a)[0]) <= 1e-12


def test_rank_stabilised_scalings_are_those_of_the_clients_own_ranks() -> None:
    # Ranks 2 and 8 with lora_alpha 4: 4 / sqrt(2) and 4 / sqrt(8), whatever the result's rank is.
    generator = seeded()
    own = [
        Factors(
            torch.randn(r, 9, generator=generator, dtype=torch.float64),
            torch.randn(10, r, generator=generator, dtype=torch.float64),
        )
        for r in (2, 8)
    ]
    scalings = torch.tensor([4 / math.sqrt(2), 4 / math.sqrt(8)], dtype=torch.float64)
    x = StackedLora(*pad(own), torch.tensor([1.0, 3.0]), scalings)
    ideal = 0.25 * scalings[0] * own[0].product() + 0.75 * scalings[1] * own[1].product()
    # A receiver of rank 10 has the scaling 4 / sqrt(10).
    after = 4 / math.sqrt(10)
    stacked = algebra.stack(x, scaling=after, ranks=[2, 8])
    assert stacked.a.shape == (10, 9)
    assert distance(after * stacked.product(), ideal) <= 1e-12
    merged = truncate(algebra.stack(x), 10, scaling=after)
    assert distance(after * merged.product(), ideal) <= 1e-12
    mean, missed = algebra.mean_of_factors(x, scaling=after), algebra.residual(x, scaling=after)
    assert distance(after * mean.product() + missed.product(), ideal) <= 1e-12


def test_a_client_of_rank_one_is_padded_and_not_repeated() -> None:
    small, large = (
        Factors(torch.ones(1, 3), torch.ones(2, 1)),
        Factors(torch.full((4, 3), 2.0), torch.full((2, 4), 3.0)),
    )
    stacked = pad([small, large])
    assert torch.equal(stacked.a[0], torch.tensor([[1.0] * 3] + [[0.0] * 3] * 3))
    assert torch.equal(stacked.b[0], torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 2))
    x = StackedLora(*stacked, torch.ones(2), torch.ones(2))
    # (1 + 4 * 6) / 2 everywhere; with rank one repeated it would be (4 + 24) / 2.
    assert torch.equal(algebra.stack(x).product(), torch.full((2, 3), 12.5))


def test_every_client_counts() -> None:
    x = cohort(5)
    for client in range(5):
        a, b = x.a.clone(), x.b.clone()
        a[client] += 1
        b[client] -= 1
        y = StackedLora(a, b, x.weights, x.scalings)
        for method in (
            lambda z: algebra.stack(z).product(),
            lambda z: algebra.mean_of_factors(z, scaling=1.0).a,
            lambda z: algebra.mean_of_factors(z, scaling=1.0).b,
            lambda z: algebra.residual(z, scaling=1.0).product(),
            lambda z: algebra.truncated_mean(z, 2).product(),
            lambda z: algebra.corrected_mean(z, scaling=1.0, ridge=0.1).b,
            lambda z: algebra.owner_mean(z, [2] * 5, scaling=1.0).a,
        ):
            assert distance(method(y), method(x)) > 1e-4


def test_scalings_of_clients_are_not_averaged() -> None:
    # One common scaling for all would give 1.0 * 0.5 * (1 + 1) = 1 instead.
    x = StackedLora(
        torch.tensor([[[1.0]], [[3.0]]]),
        torch.ones(2, 1, 1),
        torch.ones(2),
        torch.tensor([0.5, 1.5]),
    )
    assert algebra.stack(x).product().item() == (0.5 * 1 + 1.5 * 3) / 2
    mean, missed = algebra.mean_of_factors(x, scaling=1.0), algebra.residual(x, scaling=1.0)
    assert (mean.product() + missed.product()).item() == 2.5
