"""The product with a frozen matrix is the same by either library, whatever it is given."""

import hypothesis as h
import pytest
import torch
from hypothesis import strategies as st

from fedclip.models import products
from fedclip.models.products import times_transposed

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
    assert rows.tolist() == [[10.0, 20.0, 30.0]]


@h.settings(suppress_health_check=[h.HealthCheck.function_scoped_fixture], deadline=None)
@h.given(
    rows=st.integers(0, 40),
    width=SIZES,
    out=SIZES,
    plus=st.sampled_from(["nothing", "bias", "rows"]),
    views=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_the_product_in_float64(library, rows, width, out, plus, views, dtype):
    generator = torch.Generator().manual_seed(rows + 41 * width + 1681 * out)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    x = draw(width, rows).t() if views else draw(rows, width)
    weight = draw(width, out).t() if views else draw(out, width)
    added = {"nothing": None, "bias": draw(out), "rows": draw(rows, out)}[plus]
    expected = x.double() @ weight.double().t() + (0.0 if added is None else added.double())
    found = times_transposed(x, weight, added)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12
    )


def test_onednn_is_found_where_torch_has_it():
    assert (products._linear is not None) == torch.backends.mkldnn.is_available()
