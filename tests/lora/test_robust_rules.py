"""Robust rules: numbers by hand, and the same by slow loops over vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclip.lora import robust_rules as rules

POINTS = np.array([[0.0], [1.0], [2.0], [3.0], [100.0]])  # changes of five clients, one hostile


def applied(name, points, f):
    """What a rule makes of changes: their weighted sum, or of a coordinate rule its value."""
    rule = rules.RULES[name]
    if rule.coordinates:
        return rule.apply(points, f)
    return rule.apply(points @ points.T, f) @ points


BY_HAND = {
    "krum": 1.0,  # scores 1 + 4, 1 + 1, 1 + 1, 1 + 4, ...: the first of two equals
    "multi_krum": 1.5,  # the mean of 0, 1, 2, 3
    # Weights 1, 1, 1, 2 / 3 and 2 / 100 cut 0, 1, 2, 3 and 100 to the median.
    "norm_clipping": (0 + 1 + 2 + 2 + 2) / (3 + 2 / 3 + 2 / 100),
    "median": 2.0,
    "trimmed_mean": 2.0,  # of 1, 2, 3
}


@pytest.mark.parametrize(("name", "value"), BY_HAND.items())
def test_five_numbers_by_hand(name, value):
    assert applied(name, POINTS, 1) == pytest.approx([value])


def test_more_numbers_by_hand():
    assert rules.krum_scores(POINTS @ POINTS.T, 1)[:4].tolist() == [5, 2, 2, 5]
    mixed = rules.mixing(POINTS @ POINTS.T, 1) @ POINTS  # means of the four nearest
    assert mixed[:, 0].tolist() == [1.5, 1.5, 1.5, 1.5, 26.5]
    assert applied("rfa", POINTS, 1) == pytest.approx([2.0], abs=0.02)  # the median of a line
    # One step of centred clipping from 0: distances 0, 1, 2, 3, 100, of which 2 is the median.
    gram = POINTS @ POINTS.T
    assert rules.centred_clipping(gram, 1, steps=1) @ POINTS == pytest.approx([1.4])
    # The next from 1.4: away by -1.4, -0.4, 0.6, 1.6, 98.6; median 1.4; the last two are cut.
    second = 1.4 + (-1.4 - 0.4 + 0.6 + 1.4 + 1.4) / 5
    assert rules.centred_clipping(gram, 1, steps=2) @ POINTS == pytest.approx([second])
    assert rules.RULES["median"].apply(POINTS[:4], 1) == pytest.approx([1.5])
    assert rules.RULES["krum"].least(1) == 5
    assert rules.RULES["rfa"].least(1) == 3


def test_a_cap_by_hand():
    counts = np.array([80.0, 10.0, 10.0])
    # t = 0.5 (t + 20): 20 of 40; at 0.4, t = 0.4 (t + 20) = 13.3.
    assert rules.capped_weights(counts, 0.5) == pytest.approx([20, 10, 10])
    assert rules.capped_weights(counts, 0.4) == pytest.approx([40 / 3, 10, 10])
    assert rules.capped_weights(counts, 0.9) == pytest.approx(counts)
    assert rules.capped_weights(counts, 0.2) == pytest.approx([1, 1, 1])  # three fifths cannot be
    # Two of four: t = 0.3 (2 t + 30).
    assert rules.capped_weights(np.array([100.0, 50, 20, 10]), 0.3) == pytest.approx(
        [22.5, 22.5, 20, 10]
    )


# The slow twins: vectors and loops.


def slow_krum_order(x, f):
    def score(i):
        away = sorted(sum((a - b) ** 2 for a, b in zip(x[i], x[j], strict=True))
                      for j in range(len(x)) if j != i)  # fmt: skip
        return sum(away[: len(x) - f - 2])

    return sorted(range(len(x)), key=lambda i: (score(i), i))


def slow_clipped(x, center, radius):
    moved = []
    for row in x:
        length = np.linalg.norm(row - center)
        moved.append((row - center) * (1 if length <= radius else radius / length))
    return center + sum(moved) / len(x)


def slow_rfa(x):
    z = np.zeros(x.shape[1])
    for _ in range(50):
        weights = [1 / max(1e-6, np.linalg.norm(row - z)) for row in x]
        z = sum(w * row for w, row in zip(weights, x, strict=True)) / sum(weights)
    return z


def slow_weighted(x):
    norms = [np.linalg.norm(row) for row in x]
    weights = [min(1, np.median(norms) / norm) for norm in norms]
    return sum(w * row for w, row in zip(weights, x, strict=True)) / sum(weights)


def slow_centred(x):
    v = np.zeros(x.shape[1])
    for _ in range(5):
        v = slow_clipped(x, v, np.median([np.linalg.norm(row - v) for row in x]))
    return v


SLOW = {
    "krum": lambda x, f: x[slow_krum_order(x, f)[0]],
    "multi_krum": lambda x, f: np.mean([x[i] for i in slow_krum_order(x, f)[: len(x) - f]], axis=0),
    "rfa": lambda x, f: slow_rfa(x),
    "norm_clipping": lambda x, f: slow_weighted(x),
    "centred_clipping": lambda x, f: slow_centred(x),
    "median": lambda x, f: [
        np.mean(sorted(column)[(len(x) - 1) // 2 : len(x) // 2 + 1]) for column in x.T
    ],
    "trimmed_mean": lambda x, f: [np.mean(sorted(column)[f : len(x) - f]) for column in x.T],
}


@pytest.mark.parametrize("name", rules.RULES)
@pytest.mark.parametrize(("n", "f"), [(5, 1), (7, 2), (10, 3), (9, 0)])
def test_every_rule_is_its_slow_twin(name, n, f):
    draw = np.random.default_rng(n)
    for _ in range(5):
        x = draw.normal(size=(n, 6)) + 1
        x[:f] *= -5
        assert applied(name, x, f) == pytest.approx(SLOW[name](x, f), abs=1e-9)


def test_mixing_is_its_slow_twin():
    x = np.random.default_rng(1).normal(size=(8, 4))
    for i, row in enumerate(rules.mixing(x @ x.T, 2) @ x):
        nearest = sorted(range(8), key=lambda j: np.sum((x[i] - x[j]) ** 2))[:6]
        assert row == pytest.approx(x[nearest].mean(axis=0))


WEIGHING = [name for name, rule in rules.RULES.items() if not rule.coordinates]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(WEIGHING), st.floats(1e-3, 1e3))
def test_weights_are_no_more_than_one_and_know_no_order_or_scale(seed, name, scale):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(7, 3))
    weights = rules.RULES[name].apply(x @ x.T, 2)
    assert (weights >= 0).all()
    assert 0 < weights.sum() <= 1 + 1e-12
    order = draw.permutation(7)
    assert rules.RULES[name].apply(x[order] @ x[order].T, 2) == pytest.approx(
        weights[order], abs=1e-9
    )
    if name != "rfa":  # whose nu is a length
        assert rules.RULES[name].apply(scale**2 * x @ x.T, 2) == pytest.approx(weights, abs=1e-6)


@pytest.mark.parametrize("name", rules.RULES)
def test_clients_that_agree_are_taken_as_they_are(name):
    assert applied(name, np.full((5, 3), 2.0), 1) == pytest.approx([2.0, 2.0, 2.0])
    assert applied(name, np.zeros((5, 3)), 1) == pytest.approx([0.0, 0.0, 0.0])


@pytest.mark.parametrize("name", rules.RULES)
def test_what_a_minority_sends_has_a_bound(name):
    """However far f clients go, the aggregate stays with the others."""
    draw = np.random.default_rng(3)
    honest = draw.normal(size=(8, 5)) + 1
    for size in (1e1, 1e4, 1e8):
        x = np.concatenate([np.full((2, 5), -size), honest])
        assert np.linalg.norm(applied(name, x, 2) - honest.mean(axis=0)) < 4, name


@pytest.mark.parametrize("n", [3, 4, 9])
def test_a_clipped_mean_is_at_most_twice_the_median_norm(n):
    draw = np.random.default_rng(n)
    for scale in (1, 1e3, 1e9):
        x = draw.normal(size=(n, 4)) + 2
        x[: (n - 1) // 2] *= scale
        found = np.linalg.norm(applied("norm_clipping", x, 0))
        assert found <= 2 * np.median(np.linalg.norm(x, axis=1))
