"""The means of a cohort's LoRA updates: exact where they say so, and off where they do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclip.lora import aggregate as algebra
from fedclip.lora.aggregate import StackedLora
from fedclip.lora.factors import Factors, resize
from tests.support.algebra import SIDES, TOLERANCE, cohort, distance, exact_mean, seeded

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
CLIENTS = pytest.mark.parametrize("clients", [1, 2, 5])
SHAPES = pytest.mark.parametrize("sides", SIDES)


def two_by_hand() -> StackedLora:
    """Shares 3/4 and 1/4, scalings 2 and 4, updates [[2, 4], [0, 0]] and [[0, 0], [12, 0]]."""
    a = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]])
    b = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]])
    return StackedLora(a, b, torch.tensor([3, 1]), torch.tensor([2.0, 4.0]))


# What the exact mean is: 3/4 * [[2, 4], [0, 0]] + 1/4 * [[0, 0], [12, 0]].
MEAN_BY_HAND = torch.tensor([[1.5, 3.0], [3.0, 0.0]])


def test_stacking_by_hand() -> None:
    stacked = algebra.stack(two_by_hand())
    assert torch.equal(stacked.a, torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    assert torch.equal(stacked.b, torch.tensor([[1.5, 0.0], [0.0, 1.0]]))
    assert torch.equal(stacked.product(), MEAN_BY_HAND)
    # A receiver that multiplies with 2 must get half of it.
    assert torch.equal(2 * algebra.stack(two_by_hand(), scaling=2.0).product(), MEAN_BY_HAND)


def test_mean_of_factors_and_residual_by_hand() -> None:
    mean = algebra.mean_of_factors(two_by_hand(), scaling=2.0)
    # 3/4 [1, 2] + 1/4 [3, 0], and 3/4 * 2/2 [1, 0] + 1/4 * 4/2 [0, 1].
    assert torch.equal(mean.a, torch.tensor([[1.5, 1.5]]))
    assert torch.equal(mean.b, torch.tensor([[0.75], [0.5]]))
    missed = algebra.residual(two_by_hand(), scaling=2.0)
    assert torch.equal(missed.product(), torch.tensor([[-0.75, 0.75], [1.5, -1.5]]))
    assert torch.equal(2 * mean.product() + missed.product(), MEAN_BY_HAND)


@DTYPES
@CLIENTS
@SHAPES
def test_exact_methods_give_the_exact_mean(
    dtype: torch.dtype, clients: int, sides: tuple[int, int]
) -> None:
    x = cohort(clients, *sides, dtype=dtype)
    ideal, tolerance = exact_mean(x), TOLERANCE[dtype]
    assert distance(algebra.stack(x).product(), ideal) <= tolerance
    mean, missed = algebra.mean_of_factors(x, scaling=0.7), algebra.residual(x, scaling=0.7)
    assert distance(0.7 * mean.product() + missed.product(), ideal) <= tolerance
    whole = algebra.truncated_mean(x, 2 * clients, scaling=0.7)
    assert distance(0.7 * whole.product(), ideal) <= tolerance
    assert all(t.dtype == dtype for t in (*algebra.stack(x), *mean, *missed, *whole))


@settings(max_examples=40, deadline=None)
@given(
    clients=st.integers(1, 6),
    out=st.integers(1, 9),
    inner=st.integers(1, 9),
    rank=st.integers(1, 4),
    scaling=st.floats(0.05, 20),
    seed=st.integers(0, 10_000),
)
def test_exact_methods_for_any_shape(
    clients: int, out: int, inner: int, rank: int, scaling: float, seed: int
) -> None:
    x = cohort(clients, out, inner, rank, seed=seed)
    ideal = exact_mean(x)
    size = (x.b.norm() * x.a.norm()).item()  # a mean near zero has no relative precision
    whole = algebra.truncated_mean(x, clients * rank, scaling=scaling)
    mean, missed = algebra.mean_of_factors(x, scaling=scaling), algebra.residual(x, scaling=scaling)
    for found in (
        algebra.stack(x).product(),
        scaling * whole.product(),
        scaling * mean.product() + missed.product(),
    ):
        assert (found - ideal).norm() <= 1e-12 * size
    assert missed.a.shape == ((clients - 1) * rank, inner)
    assert missed.b.shape == (out, (clients - 1) * rank)


@CLIENTS
@SHAPES
def test_mean_of_factors_is_off_unless_a_factor_is_shared(
    clients: int, sides: tuple[int, int]
) -> None:
    x = cohort(clients, *sides, scalings=[0.5] * clients)
    gap = distance(0.5 * algebra.mean_of_factors(x, scaling=0.5).product(), exact_mean(x))
    assert gap <= 1e-12 if clients == 1 else gap > 1e-3
    for a, b in ((x.a[:1].expand_as(x.a), x.b), (x.a, x.b[:1].expand_as(x.b))):
        shared = StackedLora(a, b, x.weights, x.scalings)
        mean = algebra.mean_of_factors(shared, scaling=0.5)
        assert distance(0.5 * mean.product(), exact_mean(shared)) <= 1e-12


@CLIENTS
def test_rank_of_the_residual(clients: int) -> None:
    x = cohort(clients, 16, 12, 2)
    missed = algebra.residual(x, scaling=1.5)
    rank = int(torch.linalg.matrix_rank(missed.product())) if clients > 1 else 0
    assert rank == (clients - 1) * 2 == missed.a.shape[0]
    if clients == 1:
        assert torch.equal(missed.product(), torch.zeros(16, 12, dtype=torch.float64))


def test_the_truncated_mean_is_the_best_of_its_rank() -> None:
    for seed, sides in enumerate(SIDES):
        x = cohort(5, *sides, rank=2, seed=seed)
        ideal = exact_mean(x)
        best = algebra.truncated_mean(x, 2, scaling=0.5)
        error = (0.5 * best.product() - ideal).norm()
        tail = torch.linalg.svdvals(ideal)[2:]
        assert error.square().item() == pytest.approx(tail.square().sum().item(), rel=1e-10)
        others = [
            algebra.mean_of_factors(x, scaling=0.5),
            algebra.corrected_mean(x, scaling=0.5, ridge=0.01),
            algebra.corrected_mean(x, scaling=0.5, ridge=0.0),
            Factors(best.a + 0.01, best.b),
        ]
        assert all((0.5 * other.product() - ideal).norm() > error for other in others)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(4)), factor=st.integers(2, 1000), seed=st.integers(0, 999))
def test_order_of_clients_and_unit_of_weights_do_not_matter(
    order: list[int], factor: int, seed: int
) -> None:
    x = cohort(4, seed=seed)
    y = StackedLora(x.a[order], x.b[order], x.weights[order] * factor, x.scalings[order])

    def results(z: StackedLora) -> list[torch.Tensor]:
        mean = algebra.mean_of_factors(z, scaling=0.5)
        return [
            algebra.stack(z).product(),
            algebra.truncated_mean(z, 2).product(),
            *mean,
            algebra.residual(z, scaling=0.5).product(),
            algebra.corrected_mean(z, scaling=0.5, ridge=0.1).b,
            algebra.owner_mean(z, [2, 2, 2, 2], scaling=0.5).b,
        ]

    for found, expected in zip(results(y), results(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_corrected_mean_is_the_minimum_it_says() -> None:
    x, ridge = cohort(4, 6, 9), 0.3
    target = exact_mean(x) / 0.5
    mean = algebra.mean_of_factors(x, scaling=0.5)
    fair = algebra.corrected_mean(x, scaling=0.5, ridge=ridge)
    assert torch.equal(fair.a, mean.a)
    correction = (fair.b - mean.b).requires_grad_()
    missed = target - (mean.b + correction) @ mean.a
    weight = ridge * mean.a.square().sum() / len(mean.a)  # trace(A A^T) / r
    (missed.square().sum() + weight * correction.square().sum()).backward()
    assert correction.grad is not None
    assert correction.grad.norm() <= 1e-11 * target.norm()
    # A wide ridge leaves the mean of factors as it was.
    far = algebra.corrected_mean(x, scaling=0.5, ridge=1e12)
    torch.testing.assert_close(far.b, mean.b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_ridge_is_relative_to_the_size_of_a_by_hand(size: float) -> None:
    """A_i = size diag(1 +- 1, 1), so Abar Abar^T = size^2 I, and B_i = (1, 2), (5, -2).

    M - Bbar Abar is the mean of (B_i - Bbar)(A_i - Abar), size (-2, 0); so D = (-2, 0) without a
    ridge, and 1 / (1 + ridge) of that with one, whatever the size.
    """
    a = size * torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]]).double()
    b = torch.tensor([[[1.0, 2.0]], [[5.0, -2.0]]], dtype=torch.float64)
    x = StackedLora(a, b, torch.ones(2), torch.ones(2))
    for ridge, left in ((0.0, -2.0), (1.0, -1.0), (3.0, -0.5)):
        fair = algebra.corrected_mean(x, scaling=1.0, ridge=ridge)
        expected = torch.tensor([[3.0 + left, 0.0]], dtype=torch.float64)
        torch.testing.assert_close(fair.b, expected, rtol=1e-12, atol=1e-12)


def test_corrected_mean_without_ridge_where_a_lacks_rank() -> None:
    x = cohort(3, 6, 9)
    flat = StackedLora(x.a * torch.tensor([[1.0], [0.0]]), x.b, x.weights, x.scalings)
    fair = algebra.corrected_mean(flat, scaling=0.5, ridge=0.0)
    mean = algebra.mean_of_factors(flat, scaling=0.5)
    best = exact_mean(flat) @ torch.linalg.pinv(mean.a) @ mean.a
    assert distance(0.5 * fair.product(), best) <= 1e-12
    with pytest.raises(ValueError, match="ridge must not be negative, got -1"):
        algebra.corrected_mean(x, scaling=0.5, ridge=-1.0)


def test_owner_mean_by_hand() -> None:
    a = torch.tensor([[[2.0], [6.0], [0.0]], [[4.0], [0.0], [0.0]]])  # the second holds one row
    b = torch.tensor([[[1.0, 3.0, 0.0]], [[5.0, 0.0, 0.0]]])
    x = StackedLora(a, b, torch.tensor([1, 3]), torch.tensor([0.5, 1.0]))
    mean = algebra.owner_mean(x, [2, 1], scaling=1.0)
    assert torch.equal(mean.a, torch.tensor([[3.5], [6.0], [0.0]]))
    assert torch.equal(mean.b, torch.tensor([[0.125 + 3.75, 1.5, 0.0]]))
    kept = Factors(torch.full((3, 1), 9.0), torch.full((1, 3), 7.0))
    filled = algebra.owner_mean(x, [2, 1], scaling=1.0, kept=kept)
    assert torch.equal(filled.a, torch.tensor([[3.5], [6.0], [9.0]]))
    assert torch.equal(filled.b, torch.tensor([[0.125 + 3.75, 1.5, 7.0]]))
    # Plain averaging dilutes the second row to a quarter.
    assert algebra.mean_of_factors(x, scaling=1.0).a[1] == 1.5
    for ranks in ([2], [4, 1], [0, 1]):
        with pytest.raises(ValueError, match="from 1 to 3"):
            algebra.owner_mean(x, ranks, scaling=1.0)


def test_rows_weigh_as_among_their_owners_by_hand() -> None:
    a = torch.tensor([[[2.0], [6.0]], [[4.0], [0.0]]])  # the second holds one row
    b = torch.tensor([[[1.0, 3.0]], [[5.0, 0.0]]])
    x = StackedLora(a, b, torch.tensor([1, 3]), torch.tensor([0.5, 1.0]))
    # The first row is a mean over both, 1/4 * 0.5 * 1 * 2 + 3/4 * 5 * 4; the second is the
    # first client's alone, 0.5 * 3 * 6.
    mean = algebra.stack(algebra.among_owners(x, [2, 1])).product()
    assert mean.item() == 0.25 + 15 + 9
    assert algebra.stack(x).product().item() == 0.25 + 15 + 9 / 4
    whole = algebra.among_owners(x, [2, 2])
    assert torch.equal(whole.b, x.b)


@DTYPES
def test_inner_products_and_norms(dtype: torch.dtype) -> None:
    x = cohort(5, 6, 9, dtype=dtype)
    updates = torch.stack(
        [s * (b @ a).double() for a, b, s in zip(x.a, x.b, x.scalings, strict=True)]
    )
    expected = torch.einsum("iuv,juv->ij", updates, updates)
    assert distance(algebra.gram(x), expected) <= TOLERANCE[dtype]
    norms = algebra.update_norms(x)
    assert distance(norms, expected.diagonal().sqrt()) <= TOLERANCE[dtype]
    weights = algebra.norm_weights(norms)
    assert distance(weights, norms / norms.sum()) <= TOLERANCE[dtype]
    assert torch.equal(algebra.norm_weights(torch.zeros(4)), torch.full((4,), 0.25))


def test_inner_products_do_not_depend_on_the_choice_of_factors() -> None:
    x = cohort(3)
    g = torch.randn(3, 2, 2, generator=seeded(), dtype=torch.float64)
    y = StackedLora(torch.linalg.inv(g) @ x.a, x.b @ g, x.weights, x.scalings)
    assert distance(algebra.gram(y), algebra.gram(x)) <= 1e-11
    assert distance(algebra.stack(y).product(), exact_mean(x)) <= 1e-11
    # The mean of factors does: clients that re-orthogonalise must not be averaged so.
    means = [algebra.mean_of_factors(z, scaling=1.0).product() for z in (x, y)]
    assert distance(means[1], means[0]) > 0.1


def test_nothing_is_changed_in_place() -> None:
    x = cohort(3)
    before = [t.clone() for t in (x.a, x.b, x.weights, x.scalings)]
    algebra.stack(x, ranks=[1, 2, 2])
    algebra.truncated_mean(x, 2)
    algebra.corrected_mean(x, scaling=2.0, ridge=0.1)
    algebra.owner_mean(x, [1, 2, 2], scaling=2.0)
    algebra.gram(x)
    after = (x.a, x.b, x.weights, x.scalings)
    assert all(torch.equal(t, u) for t, u in zip(after, before, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    a, b, w, s = torch.ones(2, 2, 5), torch.ones(2, 7, 2), torch.ones(2), torch.ones(2)
    for bad in (a[:1], a[:, :1], a[0], a[:0]):
        with pytest.raises(ValueError, match="do not fit"):
            StackedLora(bad, b, w, s)
    with pytest.raises(ValueError, match=r"weights: \(1,\) for 2 clients"):
        StackedLora(a, b, w[:1], s)
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weights must be positive"):
            StackedLora(a, b, torch.tensor([1.0, value]), s)
        with pytest.raises(ValueError, match="scalings must be positive"):
            StackedLora(a, b, w, torch.tensor([1.0, value]))
        with pytest.raises(ValueError, match="scaling must be a positive number"):
            algebra.stack(StackedLora(a, b, w, s), scaling=value)
    with pytest.raises(ValueError, match=r"float64, got torch\.float32 and torch\.float64"):
        StackedLora(a, b.double(), w, s)


def test_padding_changes_no_exact_mean() -> None:
    x = cohort(3)
    wide = [resize(Factors(a, b), 4) for a, b in zip(x.a, x.b, strict=True)]
    y = StackedLora(
        torch.stack([f.a for f in wide]), torch.stack([f.b for f in wide]), x.weights, x.scalings
    )
    assert distance(algebra.stack(y).product(), exact_mean(x)) <= 1e-12
    dense = algebra.stack(y, ranks=[2, 2, 2])
    assert torch.equal(dense.a, algebra.stack(x).a)
    assert torch.equal(dense.b, algebra.stack(x).b)
