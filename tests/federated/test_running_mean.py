"""Weighted means: by hand, by property, and what must not be averaged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclip.federated.running_mean import RunningMean
from tests.support.algebra import weighted_mean


def test_two_clients_by_hand():
    updates = {"w": torch.tensor([[1.0, 2.0], [5.0, 10.0]])}
    # (3 * [1, 2] + 1 * [5, 10]) / 4
    assert torch.equal(weighted_mean(updates, torch.tensor([3, 1]))["w"], torch.tensor([2.0, 4.0]))


def test_the_mean_keeps_the_dtype_of_the_updates():
    mean = weighted_mean({"w": torch.ones(2, 3)}, torch.tensor([1.0, 2.0]))
    assert mean["w"].dtype == torch.float32


@settings(max_examples=50, deadline=None)
@given(
    clients=st.integers(1, 7),
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    seed=st.integers(0, 1000),
    cut=st.integers(0, 7),
)
def test_the_mean_does_not_depend_on_the_grouping(clients, shape, seed, cut):
    generator = torch.Generator().manual_seed(seed)
    tensors = {"w": torch.randn(clients, *shape, generator=generator)}
    weights = torch.randint(1, 1000, (clients,), generator=generator)
    whole = weighted_mean(tensors, weights)["w"]
    cut = min(cut, clients)
    grouped = RunningMean()
    for group in (slice(0, cut), slice(cut, None)):
        grouped.add({"w": tensors["w"][group]}, weights[group])
    assert torch.equal(whole, grouped.result()["w"])
    flat = weights.double().reshape(-1, *[1] * len(shape))
    oracle = (tensors["w"].double() * flat).sum(0) / weights.sum()
    torch.testing.assert_close(whole.double(), oracle, rtol=1e-6, atol=1e-7)


def test_updates_of_another_rank_are_refused_instead_of_broadcast():
    mean = RunningMean()
    mean.add({"lora_A": torch.ones(1, 8, 4)}, torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"\(8, 4\) and \(1, 4\)"):
        mean.add({"lora_A": torch.ones(1, 1, 4)}, torch.tensor([1.0]))


def test_updates_of_other_names_are_refused():
    mean = RunningMean()
    mean.add({"a": torch.ones(1, 2)}, torch.tensor([1.0]))
    with pytest.raises(ValueError, match="same tensors"):
        mean.add({"b": torch.ones(1, 2)}, torch.tensor([1.0]))


def test_weights_must_match_the_clients_and_be_positive():
    with pytest.raises(ValueError, match="2 updates but 1 weights"):
        weighted_mean({"a": torch.ones(2, 2)}, torch.tensor([1.0]))
    with pytest.raises(ValueError, match="positive"):
        weighted_mean({"a": torch.ones(1, 2)}, torch.tensor([0.0]))
