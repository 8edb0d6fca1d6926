"""One low-rank matrix: singular vectors by either solver, norms, and other ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclip.lora import factors as low_rank
from fedclip.lora import randomized_svd as subspace
from fedclip.lora.factors import Factors
from tests.support.algebra import SIDES, TOLERANCE, distance, seeded

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def some(
    out: int = 7, inner: int = 5, rank: int = 3, seed: int = 0, dtype=torch.float64
) -> Factors:
    generator = seeded(seed)
    a = torch.randn(rank, inner, generator=generator, dtype=torch.float64)
    b = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    return Factors(a.to(dtype), b.to(dtype))


def best_of_rank(dense: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(dense.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def test_norm_and_inner_product_by_hand() -> None:
    x = Factors(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0], [0.0]]))  # [[6, 8], [0, 0]]
    y = Factors(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [5.0]]))  # [[1, 1], [5, 5]]
    assert low_rank.norm(x) == 10.0
    assert low_rank.inner(x, y) == 14.0


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 9), inner=st.integers(1, 9), rank=st.integers(1, 9), seed=st.integers(0, 999)
)
def test_svd_of_any_shape(out: int, inner: int, rank: int, seed: int) -> None:
    x = some(out, inner, rank, seed)
    u, s, v = low_rank.svd(x)
    size = min(out, inner, rank)
    assert (u.shape, s.shape, v.shape) == ((out, size), (size,), (inner, size))
    scale = x.b.norm() * x.a.norm()  # a product near zero has no relative precision
    assert ((u * s) @ v.T - x.product()).norm() <= 1e-13 * scale
    for basis in (u, v):
        assert (basis.T @ basis - torch.eye(size)).norm() <= 1e-12
    assert (s.diff() <= 0).all()
    assert abs(low_rank.norm(x) - x.product().norm()) <= 1e-7 * scale


@DTYPES
def test_truncation_is_the_best_of_its_rank(dtype: torch.dtype) -> None:
    for out, inner in SIDES:
        x = some(out, inner, 4, dtype=dtype)
        small = low_rank.truncate(x, 2, scaling=0.25)
        assert distance(0.25 * small.product(), best_of_rank(x.product(), 2)) <= TOLERANCE[dtype]
        rows, columns = small.a @ small.a.T, small.b.T @ small.b
        torch.testing.assert_close(rows, torch.eye(2, dtype=dtype))
        assert columns[0, 1].abs() <= 1e-5 * columns[0, 0]


def test_truncation_by_hand() -> None:
    dense = torch.diag(torch.tensor([1.0, 9.0, 4.0]))
    small = low_rank.truncate(dense, 2, scaling=0.5)
    assert torch.equal(small.a, torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    assert torch.equal(small.b, torch.tensor([[0.0, 0.0], [18.0, 0.0], [0.0, 8.0]]))


def test_truncation_to_more_than_there_is_pads_with_zeros() -> None:
    x = some(rank=2)
    wide = low_rank.truncate(x, 4)
    assert (wide.a.shape, wide.b.shape) == ((4, 5), (7, 4))
    assert distance(wide.product(), x.product()) <= 1e-12
    assert not wide.a[2:].any()
    assert not wide.b[:, 2:].any()


def stacked(kind: str, dtype: torch.dtype, seed: int = 0) -> Factors:
    """Sixty clients of rank 4 on a layer of 200 x 230: 240 columns."""
    generator = seeded(seed)
    rows = torch.randn(60, 4, 230, generator=generator, dtype=torch.float64)
    columns = torch.randn(60, 200, 4, generator=generator, dtype=torch.float64)
    if kind != "flat":
        # What all clients agree on stands above what each has of its own.
        share = {"shared": 0.5, "dominant": 0.99}[kind]
        agree = 2 if kind == "dominant" else 4
        rows = share * rows[:1] + (1 - share) * rows
        columns = (1 - share) * columns
        columns[:, :, :agree] += share * torch.randn(
            1, 200, agree, generator=generator, dtype=torch.float64
        )
    b = columns.permute(1, 0, 2).flatten(1) / 60
    return Factors(rows.flatten(0, 1).to(dtype), b.to(dtype))


@DTYPES
@pytest.mark.parametrize("kind", ["flat", "shared", "dominant"])
def test_the_randomised_solver_agrees_with_the_exact_one(kind: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        x = stacked(kind, dtype, seed)
        assert subspace.leading_triplets((x.b, x.a), 4, seeded(9)) is not None
        found = low_rank.truncate(x, 4, solver="randomised", generator=seeded(9))
        best = best_of_rank(x.b.double() @ x.a.double(), 4)
        # The target is 1e-4; what is reached is the solver's own bound.
        assert distance(found.product(), best) <= 1e-5
        exact = low_rank.truncate(Factors(x.a.double(), x.b.double()), 4, solver="exact")
        assert distance(found.a, exact.a) <= 1e-4  # signs agree as well


@DTYPES
def test_the_randomised_solver_on_deficient_and_zero_matrices(dtype: torch.dtype) -> None:
    x = some(60, 50, 3, dtype=dtype)
    more = low_rank.truncate(x, 6, solver="randomised", generator=seeded())
    assert distance(more.product(), x.product()) <= TOLERANCE[dtype]
    assert more.a.isfinite().all()
    none = Factors(x.a, torch.zeros_like(x.b))
    empty = low_rank.truncate(none, 2, solver="randomised", generator=seeded())
    assert not empty.product().any()
    assert empty.a.isfinite().all()
    tiny = Factors(x.a, x.b * 1e-12)
    found = low_rank.truncate(tiny, 3, solver="randomised", generator=seeded())
    assert distance(found.product(), tiny.product()) <= TOLERANCE[dtype]


def test_dominant_directions_do_not_drown_the_others_in_float64() -> None:
    # Singular values 1e4, 1e2 and then a flat tail from 1 down, of which two are asked for too.
    generator = seeded()
    u = torch.linalg.qr(torch.randn(300, 280, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(290, 280, generator=generator, dtype=torch.float64)).Q
    s = torch.cat([torch.tensor([1e4, 1e2]), torch.linspace(1, 0.5, 278)]).double()
    dense = (u * s) @ v.T
    found = subspace.leading_triplets((dense,), 4, seeded(1))
    assert found is not None
    torch.testing.assert_close(found[1], s[:4], rtol=1e-8, atol=0)
    angles = (found[0] * u[:, :4]).sum(dim=0).abs()
    assert (1 - angles).max() <= 1e-8


def test_a_flat_spectrum_takes_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    # 3 or 4; with powers in place of Chebyshev polynomials it would be 17 to 23.
    monkeypatch.setattr(subspace, "_MAX_PASSES", 6)
    for seed in range(3):
        x = stacked("flat", torch.float64, seed)
        assert subspace.leading_triplets((x.b, x.a), 4, seeded(1)) is not None


def test_the_polynomial_is_that_of_chebyshev() -> None:
    squares = torch.tensor([9.0, 2.0, 1.5, 1.0, 0.5], dtype=torch.float64)
    u = torch.eye(5, dtype=torch.float64)[:, :4]
    found = subspace._filter([torch.diag(squares.sqrt())], u, squares[:, None] * u, known=1)
    # The first column is known already. The cut is 1, so T_m has 2 * 2 - 1 = 3 for an argument,
    # then 2, then 1; half of 16 digits are spent on T_m(3), where m = 10.
    values = [math.cosh(10 * math.acosh(x)) for x in (3, 2, 1)]
    expected = torch.zeros(5, 4, dtype=torch.float64)
    expected[0, 0] = 1
    for i, value in enumerate(values, start=1):
        expected[i, i] = value / math.hypot(*values)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)
    # A column that W maps to zero leaves no cut to scale by.
    ends = torch.tensor([1.0, 0.0])
    assert subspace._filter([torch.diag(ends)], torch.eye(2), torch.diag(ends), 0).isfinite().all()


def test_where_the_randomised_solver_gives_up_the_exact_one_takes_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = stacked("flat", torch.float64)
    monkeypatch.setattr(subspace, "_MAX_PASSES", 1)
    assert subspace.leading_triplets((x.b, x.a), 4, seeded()) is None
    found = low_rank.truncate(x, 4, solver="randomised", generator=seeded())
    assert distance(found.product(), best_of_rank(x.product(), 4)) <= 1e-12


def test_which_solver_is_chosen() -> None:
    # Rank 1 works with 17 columns, so the randomised one begins above 136.
    square = torch.eye(137)
    with pytest.raises(ValueError, match="needs a generator"):
        low_rank.leading_svd(square, 1)
    low_rank.leading_svd(square[:136], 1)
    low_rank.leading_svd(square, 1, solver="exact")
    with pytest.raises(ValueError, match="auto, exact or randomised, got 'fast'"):
        low_rank.leading_svd(square, 1, solver="fast")  # type: ignore[arg-type]
    for rank in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            low_rank.truncate(square, rank)


@DTYPES
@pytest.mark.parametrize("sides", SIDES)
def test_orthonormal_rows_keep_the_product(dtype: torch.dtype, sides: tuple[int, int]) -> None:
    x = some(*sides, rank=3, dtype=dtype)
    y = low_rank.orthonormal_rows(x)
    assert (y.a @ y.a.T - torch.eye(3)).norm() <= 3 * TOLERANCE[dtype]
    assert distance(y.product(), x.product()) <= TOLERANCE[dtype]
    assert (x.a @ x.a.T - torch.eye(3)).norm() > 0.1  # there was something to do


def test_orthonormal_rows_of_a_fresh_adapter_and_of_a_wide_one() -> None:
    x = some()
    fresh = low_rank.orthonormal_rows(Factors(x.a, torch.zeros_like(x.b)))
    assert (fresh.a @ fresh.a.T - torch.eye(3)).norm() <= 1e-12
    assert not fresh.b.any()
    # Rows of the same space: nothing that A could express is lost while B is zero.
    assert distance(x.a @ fresh.a.T @ fresh.a, x.a) <= 1e-12
    with pytest.raises(ValueError, match="rank 6 exceeds a side of the layer, 7 x 5"):
        low_rank.orthonormal_rows(some(rank=6))


def test_resize_by_hand() -> None:
    x = Factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]))
    assert low_rank.resize(x, 1).a.tolist() == [[1.0]]
    assert low_rank.resize(x, 1).b.tolist() == [[3.0]]
    assert low_rank.resize(x, 3).a.tolist() == [[1.0], [2.0], [0.0]]
    assert low_rank.resize(x, 3).b.tolist() == [[3.0, 4.0, 0.0]]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        low_rank.resize(x, 0)


def test_a_higher_rank_keeps_the_adapter() -> None:
    x = some()
    up = low_rank.set_rank(x, 5, generator=seeded(3))
    assert torch.equal(up.a[:3], x.a)  # bit for bit
    assert torch.equal(up.b[:, :3], x.b)
    assert not up.b[:, 3:].any()
    fresh = up.a[3:]
    assert fresh.abs().max() <= 5**-0.5
    assert torch.linalg.matrix_rank(up.a) == 5  # the new rows can learn
    assert torch.equal(low_rank.set_rank(x, 5, generator=seeded(3)).a, up.a)
    assert not torch.equal(low_rank.set_rank(x, 5, generator=seeded(4)).a, up.a)


@settings(max_examples=30, deadline=None)
@given(old=st.integers(1, 5), new=st.integers(1, 5), seed=st.integers(0, 99))
def test_another_rank_is_as_near_as_it_can_be(old: int, new: int, seed: int) -> None:
    x = some(rank=old, seed=seed)
    y = low_rank.set_rank(x, new, generator=seeded())
    assert (y.a.shape, y.b.shape) == ((new, 5), (7, new))
    assert distance(y.product(), best_of_rank(x.product(), new)) <= 1e-11


def test_down_and_up_again() -> None:
    x = some()
    down = low_rank.set_rank(x, 2, generator=seeded())
    up = low_rank.set_rank(down, 3, generator=seeded())
    assert distance(up.product(), best_of_rank(x.product(), 2)) <= 1e-12
    rows = (down.a @ down.a.T).diagonal()
    assert torch.allclose(rows, torch.ones_like(rows))


def test_frame_of_an_estimate() -> None:
    x = some(7, 5, 3)
    u, s, vh = torch.linalg.svd(x.product())
    for estimate in (x, x.product()):
        frame, core = low_rank.singular_frame(estimate, 2, scaling=0.5)
        torch.testing.assert_close(0.5 * core, torch.diag(s[:2]))
        assert (frame.b.T @ frame.b - torch.eye(2)).norm() <= 1e-12
        assert (frame.a @ frame.a.T - torch.eye(2)).norm() <= 1e-12
        found = 0.5 * frame.b @ core @ frame.a
        assert distance(found, (u[:, :2] * s[:2]) @ vh[:2]) <= 1e-12
    with pytest.raises(ValueError, match="3 singular values cannot give rank 4"):
        low_rank.singular_frame(x, 4)


def test_nothing_touches_the_global_generator() -> None:
    before = torch.get_rng_state()
    x = stacked("flat", torch.float32)
    low_rank.truncate(x, 4, generator=seeded())
    low_rank.set_rank(some(), 5, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_ordered_rows_worked_by_hand() -> None:
    # B A = diag(1, 4, 0): the second row holds the most, the third nothing.
    x = Factors(torch.eye(3, 4, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64))
    x.b[0, 0], x.b[1, 1] = 1.0, 4.0
    y = low_rank.ordered_rows(x)
    torch.testing.assert_close(y.product(), x.product(), rtol=0, atol=1e-12)
    lengths = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(y.a.norm(dim=1), lengths)
    torch.testing.assert_close(
        y.b.norm(dim=0), torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-12
    )
    for small in (0.0, 1e-20):  # A keeps its size while there is hardly a product
        y = low_rank.ordered_rows(Factors(x.a, x.b * small))
        torch.testing.assert_close(y.a.norm(dim=1), torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(y.product(), x.product() * small, rtol=1e-9, atol=0)


def test_ordered_rows_beyond_a_side_are_zero() -> None:
    x = some(out=2, inner=4, rank=3)
    y = low_rank.ordered_rows(x)
    assert (y.a.shape, y.b.shape) == (x.a.shape, x.b.shape)
    assert not y.a[2].any()
    assert distance(y.product(), x.product()) <= 1e-12


@given(rank=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_first_ordered_rows_are_the_nearest_adapter(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = Factors(
        *(torch.randn(n, generator=generator, dtype=torch.float64) for n in ((5, 9), (7, 5)))
    )
    y = low_rank.ordered_rows(x)
    torch.testing.assert_close(y.product(), x.product(), rtol=0, atol=1e-10)
    cut, best = low_rank.resize(y, rank), low_rank.truncate(x, rank)
    torch.testing.assert_close(cut.product(), best.product(), rtol=0, atol=1e-10)
