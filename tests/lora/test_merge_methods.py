"""The arithmetic of merging: hand-worked numbers, identities, and PEFT's own merges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from fedclip.lora.factors import Factors
from fedclip.lora.merge_methods import (
    METHODS,
    Merged,
    dare,
    knots,
    mean_of_factors,
    merge_layer,
    stacked,
    ties,
    trim,
)
from tests.support.algebra import distance, seeded

WEIGHTS = [0.5, 1.25, 0.25]


def some(*ranks: int, out: int = 7, inner: int = 5, seed: int = 0) -> list[Factors]:
    generator = seeded(seed)
    return [
        Factors(
            torch.randn(rank, inner, generator=generator, dtype=torch.float64),
            torch.randn(out, rank, generator=generator, dtype=torch.float64),
        )
        for rank in ranks
    ]


def merged(name: str, updates: list[Factors], weights: list[float], **how: Any) -> Merged:
    how = {"rank": 5, "density": 1.0, "generator": seeded()} | how
    return merge_layer(METHODS[name], updates, weights, **how)


def weighted_sum(updates: list[Factors], weights: list[float]) -> torch.Tensor:
    return torch.stack([w * x.product() for w, x in zip(weights, updates, strict=True)]).sum(dim=0)


def test_trim_keeps_the_largest_entries() -> None:
    matrix = torch.tensor([[1.0, -5.0, 0.5], [3.0, -2.0, 4.0]])
    assert trim(matrix, 0.5).tolist() == [[0, -5, 0], [3, 0, 4]]
    assert torch.equal(trim(matrix, 1.0), matrix)
    assert trim(matrix, 0.01).tolist() == [[0, -5, 0], [0, 0, 0]]


def test_ties_by_hand() -> None:
    """Signs elected by the sum: +, -, +, +; means over the entries that agree."""
    matrices = torch.tensor(
        [[[4.0, -3.0, 1.0, 2.0]], [[2.0, -1.0, 3.0, -2.0]], [[-5.0, 3.0, 2.0, 4.0]]]
    )
    found = ties(matrices, [1.0, 1.0, 1.0], density=1.0)
    assert found.tolist() == [[3.0, -2.0, 2.0, 3.0]]
    # Trimmed to two entries each: [4 -3 0 0], [2 0 3 0] (the first of equals), [-5 0 0 4].
    matrices[1, 0, 3] = -1.5
    found = ties(matrices, [1.0, 2.0, 1.0], density=0.5)
    assert found.tolist() == [[(4 + 2 * 2) / 2, -3.0, 2 * 3.0, 4.0]]


def test_linear_averages_factors_and_scales_with_the_weights() -> None:
    x = [
        Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]])),
        Factors(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0], [4.0]])),
    ]
    mean = mean_of_factors(x, [0.5, 0.5])
    assert mean.a.tolist() == [[0.5, 1.0]]
    assert mean.b.tolist() == [[1.0], [2.0]]
    twice = mean_of_factors(x, [1.0, 1.0])
    torch.testing.assert_close(twice.product(), 2 * mean.product())
    one = some(2)
    torch.testing.assert_close(mean_of_factors(one, [0.3]).product(), 0.3 * one[0].product())


def test_cat_is_the_exact_sum_of_different_ranks() -> None:
    updates = some(2, 1, 3)
    found = merged("cat", updates, WEIGHTS, rank=8)
    assert found.factors.a.shape == (8, 5)  # two rows of padding
    assert distance(found.factors.product(), weighted_sum(updates, WEIGHTS)) < 1e-14
    assert found.kept == found.total


@pytest.mark.parametrize("name", ["svd", "task-arithmetic"])
def test_svd_is_the_nearest_of_its_rank_and_says_what_it_keeps(name: str) -> None:
    updates = some(2, 1, 3)
    exact = weighted_sum(updates, WEIGHTS)
    s = torch.linalg.svdvals(exact)
    found = merged(name, updates, WEIGHTS, rank=2)
    missed = (found.factors.product() - exact).norm() ** 2
    assert missed == pytest.approx(float((s[2:] ** 2).sum()))
    assert found.kept == pytest.approx(float((s[:2] ** 2).sum()))
    assert found.total == pytest.approx(float((s**2).sum()))
    assert distance(merged(name, updates, WEIGHTS, rank=6).factors.product(), exact) < 1e-13


def test_dare_keeps_a_share_and_the_mean() -> None:
    updates, density = some(2, 3, out=40, inner=30), 0.25
    exact = weighted_sum(updates, [1.0, 0.5])
    assert distance(dare(updates, [1.0, 0.5], 1.0, seeded()), exact) < 1e-14
    once = dare(updates[:1], [1.0], density, seeded(1))
    alive = once != 0
    assert alive.double().mean() == pytest.approx(density, abs=0.04)
    torch.testing.assert_close(once[alive], updates[0].product()[alive] / density)
    generator = seeded(2)
    many = torch.stack([dare(updates, [1.0, 0.5], density, generator) for _ in range(600)])
    assert distance(many.mean(dim=0), exact) < 0.12  # sqrt(3 / 600) = 0.07 is expected


def test_the_masks_of_dare_come_from_the_generator() -> None:
    updates = some(2, 3)
    one, again, other = (dare(updates, [1, 1], 0.5, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_knots_is_ties_in_the_common_directions() -> None:
    """By the dense SVD of the updates side by side."""
    updates = some(2, 1, 3, out=9, inner=4)
    u, s, vh = torch.linalg.svd(
        torch.cat([x.product() for x in updates], dim=1), full_matrices=False
    )
    u, blocks = u[:, :6], torch.stack((s[:6, None] * vh[:6]).chunk(3, dim=1))
    for density in (1.0, 0.4):
        expected = u @ ties(blocks, WEIGHTS, density)
        assert distance(knots(updates, WEIGHTS, density).product(), expected) < 1e-12


def test_knots_of_the_same_update_is_that_update() -> None:
    (update,) = some(2)
    assert distance(knots([update, update], [1, 1], 1.0).product(), update.product()) < 1e-12


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=2, max_size=4),
    st.sampled_from(["cat", "svd", "ties", "knots", "task-arithmetic"]),
    st.integers(0, 1000),
)
def test_the_order_of_adapters_does_not_matter(ranks: list[int], name: str, seed: int) -> None:
    updates = some(*ranks, seed=seed)
    weights = [0.5 + i for i in range(len(ranks))]
    one = merged(name, updates, weights, rank=12, density=0.5)
    other = merged(name, updates[::-1], weights[::-1], rank=12, density=0.5)
    assert distance(one.factors.product(), other.factors.product()) < 1e-9


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(METHODS)), st.floats(0.1, 3), st.integers(0, 1000))
def test_merging_scales_with_the_weights(name: str, factor: float, seed: int) -> None:
    updates = some(2, 2, seed=seed)
    one = merged(name, updates, [1.0, 0.5], density=0.5).factors.product()
    scaled = merged(name, updates, [factor, factor / 2], density=0.5).factors.product()
    assert distance(scaled, factor * one) < 1e-9


@pytest.mark.parametrize("name", sorted(METHODS))
def test_updates_of_zero_merge_to_zero(name: str) -> None:
    updates = [Factors(x.a, 0 * x.b) for x in some(2, 2)]
    found = merged(name, updates, [1.0, 1.0], density=0.5)
    assert torch.equal(found.factors.product(), torch.zeros(7, 5).double())
    assert found.total == 0


@pytest.mark.filterwarnings("ignore")  # advice of PEFT
@pytest.mark.parametrize(
    ("name", "theirs", "ranks", "options"),
    [
        ("cat", "cat", (2, 4, 3), {}),
        ("svd", "svd", (2, 4, 3), {"svd_rank": 3, "svd_full_matrices": False}),
        ("ties", "ties_svd", (3, 3, 3), {"svd_rank": 3, "density": 0.3}),
        ("ties", "ties_svd", (2, 4, 3), {"svd_rank": 8, "density": 1.0}),
    ],
)
def test_peft_merges_alike(
    name: str, theirs: str, ranks: tuple[int, ...], options: dict[str, Any]
) -> None:
    """PEFT's linear differs on purpose: it takes the root of each weight on either factor."""
    net = nn.Sequential(nn.Linear(12, 9, bias=False))
    updates = some(*ranks, out=9, inner=12)
    network: Any = None
    for number, (rank, x) in enumerate(zip(ranks, updates, strict=True)):
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"])
        if network is None:
            network = get_peft_model(net, config, adapter_name="0")  # type: ignore[arg-type]
        else:
            network.add_adapter(str(number), config)
        layer = network.base_model.model[0]
        layer.lora_A[str(number)].weight.data = x.a.float()
        layer.lora_B[str(number)].weight.data = x.b.float() / 2  # lora_alpha / r is 2
    names = [str(number) for number in range(len(ranks))]
    network.base_model.add_weighted_adapter(names, WEIGHTS, "all", theirs, **options)
    expected = layer.get_delta_weight("all").double()
    rank = options.get("svd_rank", sum(ranks))
    found = merged(name, updates, WEIGHTS, rank=rank, density=options.get("density", 1.0))
    assert distance(found.factors.product(), expected) < 1e-5
    assert distance(stacked(updates, WEIGHTS).product(), weighted_sum(updates, WEIGHTS)) < 1e-13
