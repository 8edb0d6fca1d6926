"""The search for hyperparameters, and what its comparisons claim: by hand, and over and over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from scipy import stats

from fedclip.experiment.bench.comparisons import (
    holm,
    image_error,
    interval,
    p_value,
    ratio,
    verdict,
)
from fedclip.experiment.bench.tuning import Choice, NoneConverged, search

RATE = "client.learning_rate"
Loss = Callable[[Mapping[str, float]], Sequence[float | None]]


def tuned(
    knobs: Mapping[str, Sequence[float]],
    loss: Loss,
    budget: int = 6,
    allowed: Callable[[Mapping[str, float]], bool] = lambda values: True,
) -> tuple[Choice, list[dict[str, float]]]:
    """The choice, and all that was tried, in order."""
    searching, tried = search(knobs, budget, allowed), []
    try:
        wanted = next(searching)
        while True:
            tried += wanted
            wanted = searching.send([loss(values) for values in wanted])
    except StopIteration as end:
        return end.value, [dict(values) for values in tried]


def bowl(best: float) -> Loss:
    """Two seeds, lowest at `best`, by powers of ten."""
    return lambda values: [math.log10(values[RATE] / best) ** 2 + seed for seed in (0.0, 0.1)]


# --- the search ---


def test_it_goes_on_beyond_an_edge_and_then_looks_closer() -> None:
    choice, tried = tuned({RATE: [0.01, 0.1]}, bowl(3.0))
    # Outwards by the factor of 10, then by its square; then the lowest point of the parabola
    # through the best value and its neighbours, which is exact here, and a tenth beside it.
    assert [values[RATE] for values in tried] == [0.01, 0.1, 1.0, 100.0, 3.0, 3.35]
    knob = choice.knobs[RATE]
    assert (knob.value, knob.edge) == (3.0, None)
    assert knob.losses["0.1"] == pytest.approx(math.log10(0.1 / 3) ** 2 + 0.05)


def test_without_a_parabola_it_halves_the_wider_gap() -> None:
    def loss(values: Mapping[str, float]) -> list[float | None]:
        return [None, None] if values[RATE] > 0.5 else [-values[RATE]] * 2

    tried = tuned({RATE: [0.01, 0.1]}, loss, budget=4)[1]
    assert [values[RATE] for values in tried] == [0.01, 0.1, 1.0, 0.316]


def test_every_search_takes_the_same_number_of_values() -> None:
    for best in (1e-5, 0.01, 0.03, 0.5, 100.0):
        assert len(tuned({RATE: [0.005, 0.01, 0.02]}, bowl(best), budget=7)[1]) == 7


def test_an_edge_at_the_end_of_the_budget_is_told() -> None:
    high = tuned({RATE: [0.01, 0.1]}, bowl(1e9), budget=4)[0]
    assert (high.knobs[RATE].value, high.knobs[RATE].edge, high.edge) == (100.0, "highest", RATE)
    low = tuned({RATE: [0.01, 0.1]}, bowl(1e-9), budget=3)[0]
    assert (low.knobs[RATE].value, low.knobs[RATE].edge) == (0.001, "lowest")


def test_what_the_configuration_refuses_is_a_bound_and_no_edge() -> None:
    knobs = {"federation.server_optimizer.momentum": [0.5, 0.9]}
    choice, tried = tuned(
        knobs,
        lambda values: [1 - next(iter(values.values()))] * 2,
        allowed=lambda values: next(iter(values.values())) < 1,
    )
    knob = next(iter(choice.knobs.values()))
    assert knob.edge is None
    assert knob.value == 0.9
    assert all(value < 1 for values in tried for value in values.values())
    at_zero, _ = tuned({RATE: [0.0, 0.1]}, lambda values: [values[RATE]] * 2)
    assert (at_zero.values[RATE], at_zero.edge) == (0.0, None)  # nothing lies below


def test_whole_numbers_stay_whole() -> None:
    choice, tried = tuned(
        {"client.local_epochs": [1, 2]}, lambda v: [(next(iter(v.values())) - 6) ** 2] * 2
    )
    assert all(isinstance(value, int) for values in tried for value in values.values())
    assert next(iter(choice.values.values())) in (4, 6, 8)


def test_knobs_are_tuned_in_turn_the_others_at_their_best() -> None:
    def loss(values: Mapping[str, float]) -> list[float]:
        found = math.log10(values[RATE] / 0.1) ** 2 + math.log10(values["client.proximal_mu"]) ** 2
        return [found, found + 0.1]

    knobs = {RATE: [0.01, 0.1, 1.0], "client.proximal_mu": [0.1, 1.0, 10.0]}
    choice, tried = tuned(knobs, loss, budget=4)
    assert choice.values == {RATE: 0.1, "client.proximal_mu": 1.0}
    assert len(tried) == 8
    assert {values["client.proximal_mu"] for values in tried[:4]} == {1.0}  # its middle
    assert {values[RATE] for values in tried[4:]} == {0.1}  # its best


def test_one_value_is_taken_as_it_is() -> None:
    choice, tried = tuned({RATE: [0.5]}, bowl(1))
    assert (choice.values, choice.knobs[RATE].losses, tried) == ({RATE: 0.5}, {}, [])


def test_diverged_values_lose_and_nothing_converges_is_an_error() -> None:
    choice, _ = tuned({RATE: [0.1, 1.0]}, lambda v: [1.0, None] if v[RATE] > 0.5 else [2.0, 2.0])
    assert choice.values[RATE] < 0.5
    assert choice.knobs[RATE].losses["1"] is None
    with pytest.raises(NoneConverged, match=r"at every client.learning_rate.*\(0.0001, 0.01, "):
        tuned({RATE: [0.1, 1.0]}, lambda v: [None, None], budget=4)


def test_ties_and_equals() -> None:
    def loss(values: Mapping[str, float]) -> list[float]:
        return {0.1: [0.50, 0.60], 0.2: [0.55, 0.54], 0.4: [0.9, 0.9]}[values[RATE]]

    knob = tuned({RATE: [0.1, 0.2, 0.4]}, loss, budget=3)[0].knobs[RATE]
    # 0.2 is best by 0.005; 0.1 differs by -0.05 and 0.06, whose standard error is 0.055.
    assert (knob.value, knob.ties) == (0.2, (0.1,))
    equal = tuned({RATE: [0.1, 0.2]}, lambda v: [0.5, 0.6], budget=2)[0].knobs[RATE]
    assert (equal.value, equal.ties) == (0.1, (0.2,))


# --- the comparisons ---


def test_interval_by_hand() -> None:
    # Three values: t(0.975, 2) = 4.30265; the standard deviation of 1, 2, 3 is 1.
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.302653 / math.sqrt(3))
    low, high = stats.ttest_1samp([1.0, 2.0, 3.0], 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert interval([0.5]).half is None
    assert interval([0.9, 1.0, 0.99], share=True).high == 1.0
    # A large error from the images has the normal distribution's width.
    wide = interval([0.5, 0.5001], image_error=0.1)
    assert wide.half == pytest.approx(1.96 * 0.1, rel=1e-3)


def test_holm_by_hand() -> None:
    """0.01 * 3, then 0.02 * 2 = 0.04, then the larger of 0.04 and 0.03."""
    found = holm({"a": 0.02, "b": 0.01, "c": 0.03})
    assert {name: p for name, (p, _) in found.items()} == pytest.approx(
        {"b": 0.03, "a": 0.04, "c": 0.04}
    )
    assert {name: level for name, (_, level) in found.items()} == pytest.approx(
        {"b": 0.05 / 3, "a": 0.025, "c": 0.05}
    )
    assert holm({}) == {}


@pytest.mark.parametrize("seed", range(5))
def test_a_corrected_interval_leaves_out_zero_where_p_says_so(seed: int) -> None:
    draws = np.random.default_rng(seed).normal(0.5, 1, (8, 5))
    p_values = {str(i): p_value(list(row), 0.1) for i, row in enumerate(draws)}
    found = holm({name: p for name, p in p_values.items() if p is not None})
    failed = False
    for name in sorted(found, key=lambda name: p_values[name] or 0):
        level = found[name][1]
        corrected = interval(list(draws[int(name)]), image_error=0.1, level=level)
        assert corrected.low is not None
        assert corrected.high is not None
        failed = failed or corrected.low <= 0 <= corrected.high  # Holm stops at the first
        assert (found[name][0] > 0.05) == failed


def test_the_images_error_is_that_of_their_mean() -> None:
    hits = np.random.default_rng(0).integers(0, 2, (3, 400)).astype(float)
    expected = hits.mean(axis=0).std() / math.sqrt(400)
    assert image_error(hits) == pytest.approx(expected, rel=0.1)
    assert image_error(np.ones((3, 10))) == 0.0


def test_ratio_by_hand() -> None:
    """Without noise below, Fieller's interval is that of the mean above, divided."""
    found = ratio([0.4, 0.5, 0.6], [0.5, 0.5, 0.5])
    half = 4.302653 * 0.1 / math.sqrt(3) / 0.5
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, 1 - half, 1 + half))
    assert ratio([0.5, 0.5], [0.1, -0.1]).low is None  # below may be 0


def test_fieller_holds_the_ratio_as_often_as_it_says() -> None:
    rng, inside = np.random.default_rng(1), 0
    for _ in range(1000):
        common = rng.normal(0, 0.02, 5)
        found = ratio(0.72 + common + rng.normal(0, 0.01, 5), 0.8 + common)
        inside += found.low is not None and found.low <= 0.9 <= (found.high or 0)
    assert 0.93 <= inside / 1000 <= 0.97


def test_verdicts() -> None:
    assert [verdict(0.1, 0.01), verdict(-0.1, 0.01), verdict(0.1, 0.2), verdict(0.1, None)] == [
        "better", "worse", "tie", "tie",
    ]  # fmt: skip


# --- a thousand experiments whose truth is known ---

ARMS, SEEDS, NOISE, TUNING_NOISE = 4, 10, 0.01, 0.003


def experiment(rng: np.random.Generator, gaps: Sequence[float]) -> tuple[list[str], int]:
    """Verdicts against the first arm, and how many best rates lie inside their grids.

    Accuracy falls off with the square of the rate's distance (by factors of two) from the arm's
    own best one, which lies anywhere within a factor of 8 from the middle of the list. How well an
    arm was tuned is part of what is compared.
    """
    accuracies, inside = [], 0
    for gap in gaps:
        best = 0.01 * 2.0 ** rng.uniform(-3, 3)

        def loss(values: Mapping[str, float], best: float = best) -> list[float]:
            off = 0.01 * math.log2(values[RATE] / best) ** 2
            return list(off + rng.normal(0, TUNING_NOISE, 2))

        choice, _ = tuned({RATE: [0.005, 0.01, 0.02]}, loss, budget=8)
        inside += choice.edge is None
        off = 0.01 * math.log2(choice.values[RATE] / best) ** 2
        accuracies.append(0.7 + gap - off + rng.normal(0, NOISE, SEEDS))
    p_values = {}
    for arm in range(1, len(gaps)):
        p = p_value(list(accuracies[arm] - accuracies[0]))
        assert p is not None
        p_values[str(arm)] = p
    adjusted = holm(p_values)
    said = [
        verdict(float((accuracies[int(a)] - accuracies[0]).mean()), p)
        for a, (p, _) in sorted(adjusted.items())
    ]
    return said, inside


STANDARD_ERROR = NOISE * math.sqrt(2 / SEEDS)


def test_equal_arms_are_rarely_told_apart_and_their_best_rates_lie_inside() -> None:
    rng = np.random.default_rng(2)
    found = [experiment(rng, [0.0] * ARMS) for _ in range(1000)]
    wrong = sum(set(said) != {"tie"} for said, _ in found)
    assert wrong / 1000 <= 0.07, wrong
    assert sum(inside for _, inside in found) / (1000 * ARMS) >= 0.95


@pytest.mark.parametrize("sign", [1, -1])
def test_a_difference_of_five_standard_errors_is_claimed_with_its_sign(sign: int) -> None:
    rng = np.random.default_rng(3)
    gaps = [0.0, sign * 5 * STANDARD_ERROR, 0.0, 0.0]
    said = [experiment(rng, gaps)[0][0] for _ in range(500)]
    right, wrong = ("better", "worse") if sign > 0 else ("worse", "better")
    assert said.count(right) / 500 >= 0.8
    assert said.count(wrong) / 500 <= 0.01


def test_a_ratios_interval_counts_seeds_and_test_images_together() -> None:
    """Against 1,000 experiments in which images and seeds are drawn anew: 95 % hold the truth."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        hard = rng.random(300)  # of each image
        shift = rng.normal(0, 0.01, (5, 2))  # of each seed and arm
        ours, theirs = (
            (hard < 0.8 * factor + shift[:, [arm]]) ^ (rng.random((5, 300)) < 0.02)
            for arm, factor in enumerate((0.95, 1.0))
        )
        means = [side.mean(axis=1).tolist() for side in (ours, theirs)]
        found = ratio(*means, (ours.astype(float), theirs.astype(float)))
        truth = (0.76 * 0.98 + 0.24 * 0.02) / (0.8 * 0.98 + 0.2 * 0.02)
        assert found.low is not None
        assert found.high is not None
        held += found.low < truth < found.high
    assert 0.94 < held / 1000 < 0.99


def test_images_on_which_arms_agree_add_nothing_to_a_ratio_of_one() -> None:
    hits = np.tile([1.0, 1.0, 0.0, 1.0], (3, 25))
    seeds = [0.74, 0.75, 0.76]
    assert ratio(seeds, seeds, (hits, hits)).half == pytest.approx(0.0, abs=1e-9)
    apart = ratio([0.73, 0.75, 0.77], seeds)
    both = ratio([0.73, 0.75, 0.77], seeds, (hits, hits))
    assert both.half == pytest.approx(apart.half, rel=0.05)
    other = ratio([0.73, 0.75, 0.77], seeds, (hits, np.roll(hits, 1, axis=1)))
    assert other.half is not None
    assert apart.half is not None
    assert other.half > apart.half
