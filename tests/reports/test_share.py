"""Wilson's interval of a share of test images, and what is said of few."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from fedclip.reports.share import FEW, few, interval_of, wilson


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
     (1, 29, 0.0061, 0.1718)],
)  # fmt: skip
def test_as_published(right: int, count: int, low: float, high: float) -> None:
    # Newcombe 1998, doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E, table I
    assert wilson(right / count, count) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_as_scipy_has_it(pair: tuple[int, int]) -> None:
    right, count = pair
    low, high = wilson(right / count, count)
    known = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((known.low, known.high), abs=1e-9)
    assert 0 <= low <= right / count + 1e-12
    assert right / count - 1e-12 <= high <= 1


def test_what_is_unknown_has_no_interval() -> None:
    assert interval_of(None, 3) is interval_of(0.5, None) is interval_of(0.5, 0) is None
    assert interval_of(0.5, 10, tasks=True) is None
    assert interval_of(1.0, 43) == "0.918 to 1.000"


def test_few_images_are_said_to_be_few() -> None:
    assert few(FEW) is few(None) is few(0) is None
    assert few(1) == "a single test image is little to go by: each one moves the accuracy by 1.000"
    assert str(few(FEW - 1)).startswith("99 test images are little")
