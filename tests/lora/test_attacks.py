"""Attacks as functions of a round's changes: numbers by hand, and what each is bound by."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclip.lora.attacks import ATTACKS

HONEST = np.array([[1.0, 2.0], [3.0, 2.0], [2.0, 5.0]])
OWN = np.array([[1.0, -1.0], [0.0, 4.0]])


def sent(name, strength=None, own=OWN, honest=HONEST, seed=0):
    row = ATTACKS[name]
    strength = row.strength if strength is None else strength
    return np.asarray(row.send(own, honest, np.random.default_rng(seed), strength or 0.0))


@pytest.mark.parametrize(
    ("name", "strength", "expected"),
    [
        ("sign_flip", 5, [[-5, 5], [0, -20]]),
        ("scaling", 10, [[10, -10], [0, 40]]),
        ("alie", 2, [[2 - 2 * 1, 3 - 2 * np.sqrt(3)]] * 2),  # sample deviations 1 and sqrt(3)
        ("ipm", 0.5, [[-1, -1.5]] * 2),
    ],
)
def test_by_hand(name, strength, expected):
    np.testing.assert_allclose(sent(name, strength), expected, rtol=1e-12)


def test_noise_has_a_multiple_of_the_median_norm_and_follows_from_the_draw():
    norms = np.linalg.norm(sent("gaussian", 10), axis=1)
    np.testing.assert_allclose(norms, 10 * np.sqrt(13), rtol=1e-12)
    assert not np.allclose(sent("gaussian")[0], sent("gaussian")[1])
    assert (sent("gaussian") == sent("gaussian")).all()
    assert (sent("gaussian", seed=1) != sent("gaussian")).any()


MIN_MAX = ("min_max", "min_max_sign", "min_max_std")


@pytest.mark.parametrize("name", MIN_MAX)
def test_min_max_by_hand(name):
    """Of 0, 1 and 2 the mean is 1, and the farthest from -x is 2: 2 - (1 - g) = 2 has g = 1."""
    found = sent(name, own=np.ones((1, 1)), honest=np.array([[0.0], [1.0], [2.0]]))
    assert found.item() == pytest.approx(0.0, abs=1e-9)


def test_the_directions_of_min_max_by_hand():
    """The mean is (2, -1), the deviations are 2 and 1."""
    honest = np.array([[0.0, -2.0], [2.0, -1.0], [4.0, 0.0]])
    mean = honest.mean(axis=0)
    for name, direction in zip(MIN_MAX, ([-2.0, 1.0], [-1.0, 1.0], [-2.0, -1.0]), strict=True):
        away = (sent(name, own=np.ones((1, 2)), honest=honest) - mean)[0]
        np.testing.assert_allclose(
            away / np.linalg.norm(away), direction / np.linalg.norm(direction), atol=1e-9
        )


@pytest.mark.parametrize("name", MIN_MAX)
@given(st.integers(2, 8), st.integers(1, 6), st.integers(0, 1000))
def test_min_max_is_as_far_as_two_honest_changes_are_and_no_farther(name, n, width, seed):
    honest = np.random.default_rng(seed).normal(size=(n, width)) + 0.3
    (found,) = sent(name, own=np.ones((1, width)), honest=honest)
    apart = np.linalg.norm(honest[:, None] - honest, axis=2).max()
    assert np.linalg.norm(honest - found, axis=1).max() == pytest.approx(apart, rel=1e-6)
    if name != "min_max_std":  # which has nothing to do with where the mean lies
        assert found @ honest.mean(axis=0) <= honest.mean(axis=0) @ honest.mean(axis=0)


@pytest.mark.parametrize("name", [name for name, row in ATTACKS.items() if row.send])
def test_one_honest_client_is_enough(name):
    found = sent(name, honest=HONEST[:1])
    assert found.shape == OWN.shape
    assert np.isfinite(found).all()
