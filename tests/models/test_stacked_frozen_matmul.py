"""The product with a frozen matrix is the same by either library, whatever it is given."""

import hypothesis as h
import pytest
import torch
from hypothesis import strategies as st

from fedclip.models.stacked import frozen_matmul as products
from fedclip.models.stacked.frozen_matmul import times_transposed

SIZES = st.integers(1, 40)


@pytest.fixture(params=["onednn", "torch"])
def library(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(products, "_linear", None)
    return request.param


def test_worked_by_hand(library):
    x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0], [0.0, 1.0]])
    assert times_transposed(x, weight).tolist() == [[11.0, 17.0, 2.0]]
    bias = torch.tensor([1.0, 2.0, 3.0])
    assert times_transposed(x, weight, bias).tolist() == [[12.0, 19.0, 5.0]]
    rows = torch.tensor([[10.0, 20.0, 30.0]])
    assert times_transposed(x, weight, rows).tolist() == [[21.0, 37.0, 32.0]]
    assert times_transposed(x, weight, bias, factor=2.0).tolist() == [[23.0, 36.0, 7.0]]
    assert times_transposed(x, weight.t().contiguous().t(), factor=0.5).tolist() == [
        [5.5, 8.5, 1.0]
    ]
    narrow = torch.tensor([[3.0, 4.0]])
    assert times_transposed(x, narrow, bias[:1], factor=2.0).tolist() == [[23.0]]


@h.settings(suppress_health_check=[h.HealthCheck.function_scoped_fixture], deadline=None)
@h.given(
    rows=st.integers(0, 40),
    width=SIZES,
    out=SIZES,
    plus=st.sampled_from(["nothing", "bias", "rows"]),
    factor=st.sampled_from([1.0, 1.702]),
    views=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_the_product_in_float64(library, rows, width, out, plus, factor, views, dtype):
    generator = torch.Generator().manual_seed(rows + 41 * width + 1681 * out)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    x = draw(width, rows).t() if views else draw(rows, width)
    weight = draw(width, out).t() if views else draw(out, width)
    added = {"nothing": None, "bias": draw(out), "rows": draw(rows, out)}[plus]
    expected = factor * x.double() @ weight.double().t()
    if added is not None:
        expected = expected + added.double()
    found = times_transposed(x, weight, added, factor=factor)
    assert found.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert (found.double() - expected).norm() <= tolerance * (expected.norm() + width**0.5)


def test_onednn_is_found_where_torch_has_it():
    assert (products._linear is not None) == torch.backends.mkldnn.is_available()
