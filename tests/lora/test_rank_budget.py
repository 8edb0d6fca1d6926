"""Each layer's rank: least for its energy, best within a budget; AdaLoRA's schedule and scores."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.adalora.layer import RankAllocator

from fedclip.lora import factors as low_rank
from fedclip.lora.aggregate import stack
from fedclip.lora.rank_budget import Importance, allocate, cubic_budget, importance, is_due
from tests.support.algebra import cohort, exact_mean

LAYERS = {"q": [16.0, 3.0, 1.0], "v": [5.0, 4.0, 1.0]}  # sums 20 and 10


def ranks(energies: Any = LAYERS, **changes: Any) -> dict[str, int]:
    usual = {"energy": 0.9, "budget": 100, "minimum": 1, "maximum": 8}
    return allocate(energies, **{**usual, **changes})


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.5, {"q": 1, "v": 1}),  # 16/20 and exactly 5/10
        (0.51, {"q": 1, "v": 2}),
        (0.81, {"q": 2, "v": 2}),  # 19/20, 9/10
        (0.95, {"q": 2, "v": 3}),
        (1.0, {"q": 3, "v": 3}),
    ],
)
def test_the_least_rank_that_keeps_the_share(share: float, expected: dict[str, int]) -> None:
    assert ranks(energy=share) == expected


def test_ranks_are_clamped_and_no_energy_wants_the_minimum() -> None:
    assert ranks(energy=1.0, maximum=2) == {"q": 2, "v": 2}
    assert ranks(energy=0.5, minimum=2) == {"q": 2, "v": 2}
    assert ranks({"zero": [0.0, 0.0], "none": [], "tail": [2.0, 0.0]}, energy=1.0) == {
        "zero": 1,
        "none": 1,
        "tail": 1,
    }
    assert ranks({"zero": [0.0], "q": [1.0]}, minimum=3) == {"zero": 3, "q": 3}


def test_a_budget_goes_to_the_largest_values_of_all_layers() -> None:
    # After a rank each: 4 (v), 3 (q), then 1 of q before 1 of v.
    for budget, expected in ((2, (1, 1)), (3, (1, 2)), (4, (2, 2)), (5, (3, 2)), (6, (3, 3))):
        found = ranks(energy=1.0, budget=budget)
        assert found == dict(zip("qv", expected, strict=True))
    # Equal values go to the lower rank first.
    assert ranks(dict.fromkeys("qv", [4.0] * 3), energy=1.0, budget=4) == {"q": 2, "v": 2}
    # Nobody gets more than is wanted, though 3 of q is worth more than 1 of v.
    assert ranks({"q": [16.0, 3.0], "v": [1.0, 1.0, 1.0]}, energy=0.8, budget=3) == {"q": 1, "v": 2}


SQUARES = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=4).map(
    lambda values: sorted(values, reverse=True)
)
LAYER_SETS = st.lists(SQUARES, min_size=1, max_size=4).map(lambda x: dict(enumerate(x)))


def choices(most: dict[Any, int], minimum: int) -> Any:
    for found in itertools.product(*(range(minimum, high + 1) for high in most.values())):
        yield dict(zip(most, found, strict=True))


def kept(energies: dict[Any, list[float]], found: dict[Any, int]) -> float:
    return sum(sum(energies[layer][:rank]) for layer, rank in found.items())


@settings(max_examples=150, deadline=None)
@given(LAYER_SETS, st.sampled_from([0.3, 0.6, 0.9, 1.0]), st.integers(1, 2), st.integers(0, 12))
def test_no_other_ranks_within_the_budget_keep_more(
    energies: dict[Any, list[float]], share: float, minimum: int, extra: int
) -> None:
    wanted = ranks(energies, energy=share, minimum=minimum, maximum=3)
    budget = minimum * len(energies) + extra
    found = ranks(energies, energy=share, minimum=minimum, maximum=3, budget=budget)
    assert all(minimum <= found[layer] <= wanted[layer] <= 3 for layer in energies)
    assert sum(found.values()) == min(budget, sum(wanted.values()))
    allowed = [x for x in choices(wanted, minimum) if sum(x.values()) <= budget]
    assert kept(energies, found) == max(kept(energies, x) for x in allowed)


def test_a_rank_stays_while_it_is_nearly_what_is_wanted() -> None:
    # At 0.9 q wants 2; between 0.9 * 0.88 = 0.792 (wants 1) and 1.0 (wants 3) 1 to 3 may stay.
    q = {"q": LAYERS["q"]}
    assert ranks(q) == {"q": 2}
    for old, loose, tight in ((1, 1, 2), (2, 2, 2), (3, 3, 2), (4, 2, 2)):
        assert ranks(q, previous={"q": old}, hysteresis=0.12) == {"q": loose}
        assert ranks(q, previous={"q": old}, hysteresis=0.01) == {"q": tight}
        assert ranks(q, previous={"q": old}) == {"q": 2}
    assert ranks(q, previous={"q": 3}, hysteresis=0.12, maximum=2) == {"q": 2}
    assert ranks(q, previous={"other": 3}, hysteresis=0.12) == {"q": 2}


def test_under_a_budget_a_held_rank_counts_a_little_more() -> None:
    close = {"q": [9.0, 4.0], "v": [9.0, 4.2]}
    for old, expected in (({"q": 1, "v": 2}, (1, 2)), ({"q": 2, "v": 1}, (2, 1)), ({}, (1, 2))):
        found = ranks(close, energy=1.0, budget=3, previous=old, hysteresis=0.1)
        assert found == dict(zip("qv", expected, strict=True))
    assert ranks(close, energy=1.0, budget=3, previous={"q": 2, "v": 1}) == {"q": 1, "v": 2}


@settings(max_examples=100, deadline=None)
@given(LAYER_SETS, st.integers(0, 8), st.sampled_from([0.0, 0.1, 0.5]), st.integers(1, 4))
def test_unchanged_energies_change_no_rank(
    energies: dict[Any, list[float]], extra: int, hysteresis: float, start: int
) -> None:
    budget = len(energies) + extra
    old = dict.fromkeys(energies, start)
    settled = ranks(energies, budget=budget, previous=old, hysteresis=hysteresis)
    assert sum(settled.values()) <= budget
    again = ranks(energies, budget=budget, previous=settled, hysteresis=hysteresis)
    assert again == settled


def test_what_is_kept_is_the_energy_of_the_cut_mean() -> None:
    x = cohort(clients=3, out=7, inner=9, rank=2)
    factors, dense = stack(x), exact_mean(x)
    squares = low_rank.svd(factors)[1].square()
    (rank,) = ranks({"q": squares}, energy=0.8).values()
    total = dense.square().sum()
    for k in (rank - 1, rank):
        cut = low_rank.truncate(factors, k).product() if k else torch.zeros_like(dense)
        share = 1 - (dense - cut).square().sum() / total
        assert (share >= 0.8) == (k == rank)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"energy": 0.0}, "energy must be in"),
        ({"energy": 1.1}, "energy must be in"),
        ({"hysteresis": 1.0}, "hysteresis"),
        ({"minimum": 0}, "minimum"),
        ({"minimum": 9}, "minimum"),
        ({"budget": 1}, "a minimum of 1 costs 2, but the budget is 1"),
        ({"energies": {"q": [1.0, 2.0]}}, "q: values must be"),
        ({"energies": {"q": [1.0, -1.0]}}, "q: values must be"),
        ({"energies": {"q": [math.nan]}}, "q: values must be"),
        ({"energies": {"q": [math.inf]}}, "q: values must be"),
    ],
)
def test_what_cannot_be_allocated(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranks(**changes)


def test_the_budget_falls_as_a_cube() -> None:
    plan = {"start": 100.0, "end": 20.0, "warmup": 0.2, "cooldown": 0.3}
    # Half way between 0.2 and 0.7 an eighth of the fall is left.
    for progress, expected in ((0, 100), (0.2, 100), (0.45, 30), (0.7, 20), (1, 20)):
        assert cubic_budget(progress, **plan) == pytest.approx(expected, abs=1e-9)
    assert cubic_budget(0.5, start=9, end=1, warmup=0.5, cooldown=0.5) == 1
    for shares in ({"warmup": -0.1}, {"cooldown": -0.1}, {"warmup": 0.8}):
        with pytest.raises(ValueError, match="must be in"):
            cubic_budget(0.5, **{**plan, **shares})
    with pytest.raises(ValueError, match="must be in"):
        cubic_budget(1.01, **plan)


def peft_allocator(**settings: Any) -> RankAllocator:
    allocator = object.__new__(RankAllocator)  # without a model
    allocator.peft_config = SimpleNamespace(**settings)
    allocator.adapter_name = "default"
    return allocator


def test_the_budget_is_that_of_peft() -> None:
    allocator = peft_allocator(tinit=20, tfinal=30, total_step=100, deltaT=1)
    allocator.init_bgt, allocator.target_bgt = 96, 40
    for step in range(101):
        budget = cubic_budget(step / 100, start=96, end=40, warmup=0.2, cooldown=0.3)
        assert int(budget + 1e-9) == allocator.budget_schedule(step)[0]


def test_ranks_change_between_warm_up_and_cool_down() -> None:
    def due(rounds: int, **plan: Any) -> list[int]:
        return [n for n in range(1, rounds + 1) if is_due(n, rounds, **plan)]

    assert due(10, every=1, warmup=0.2, cooldown=0.3) == [3, 4, 5, 6, 7]
    assert due(10, every=3, warmup=0.2, cooldown=0.3) == [3, 6, 7]
    assert due(10, every=1, warmup=0.0, cooldown=0.7) == [1, 2, 3]  # 10 * (1 - 0.7) is above 3
    assert due(5, every=2, warmup=0.0, cooldown=0.0) == [2, 4, 5]
    assert due(7, every=9, warmup=0.5, cooldown=0.2) == [6]  # ceil(5.6)


def test_importance_by_hand() -> None:
    first = importance([], [3.0, 1.0], beta1=0.5, beta2=0.75)
    # I = 9, 1; mean = I / 2; uncertainty = |I - I / 2| / 4
    assert first.mean.tolist() == [4.5, 0.5]
    assert first.uncertainty.tolist() == [1.125, 0.125]
    assert first.scores.tolist() == [5.0625, 0.0625]
    second = importance([3.0, 1.0], [3.0, 2.0, 1.0], first, beta1=0.5, beta2=0.75)
    # I = 0, 2, 1: the largest has settled. mean 2.25, 1.25, 0.5;
    # uncertainty 0.75 * before + |I - mean| / 4: 0.84375 + 0.5625, 0.09375 + 0.1875, 0.125
    assert second.mean.tolist() == [2.25, 1.25, 0.5]
    assert second.uncertainty.tolist() == [1.40625, 0.28125, 0.125]
    assert second.scores.tolist() == [3.1640625, 0.3515625, 0.0625]


def test_importance_is_smoothed_as_in_peft() -> None:
    """With PEFT's gradient standing for the change: the same weights, the same two averages."""
    allocator = peft_allocator()
    allocator.beta1, allocator.beta2 = 0.85, 0.7
    allocator.reset_ipt()
    values = [[0.0, 0.0], [4.0, 1.0], [3.0, 2.5], [3.5, 0.5]]
    found: Importance | None = None
    for before, after in itertools.pairwise(values):
        weight = torch.nn.Parameter(torch.tensor(after, dtype=torch.float64))
        weight.grad = weight.detach() - torch.tensor(before, dtype=torch.float64)
        allocator.update_ipt(
            SimpleNamespace(named_parameters=lambda w=weight: [("lora_E.default", w)])
        )
        found = importance(before, after, found, beta1=0.85, beta2=0.7)
    assert found is not None
    expected = allocator._element_score("lora_E.default").sort(descending=True).values
    torch.testing.assert_close(found.scores, expected, rtol=1e-12, atol=0)


def test_scores_are_what_allocate_takes() -> None:
    # The second triplet of q has the higher score; how many of a layer's are chosen is what counts.
    q = Importance(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0]))
    v = Importance(torch.tensor([2.0, 1.0]), torch.tensor([2.0, 0.5]))
    scores = {"q": q.scores, "v": v.scores}
    assert scores["q"].tolist() == [9.0, 1.0]
    assert ranks(scores, energy=1.0, budget=3) == {"q": 2, "v": 1}


def test_what_cannot_have_an_importance() -> None:
    for beta in ({"beta1": 1.0}, {"beta2": -0.1}):
        with pytest.raises(ValueError, match="beta1 and beta2"):
            importance([1.0], [2.0], **beta)
    with pytest.raises(ValueError, match="after: values"):
        importance([1.0], [1.0, 2.0])


def test_what_a_narrow_layer_cannot_have_goes_to_the_others() -> None:
    """q may have 2 ranks at most; of a budget of 10 the other 8 are v's, though q's values lead."""
    energies = {"q": [10.0] * 8, "v": [1.0] * 16}
    rule = {"energy": 1.0, "budget": 10, "minimum": 1}
    assert allocate(energies, maximum=16, **rule) == {"q": 8, "v": 2}
    assert allocate(energies, maximum={"q": 2, "v": 16}, **rule) == {"q": 2, "v": 8}
    least = {**rule, "budget": 5, "minimum": 3}
    assert allocate(energies, maximum={"q": 2, "v": 16}, **least) == {"q": 2, "v": 3}
    with pytest.raises(ValueError, match="a minimum of 3 costs 5, but the budget is 4"):
        allocate(energies, maximum={"q": 2, "v": 16}, **{**least, "budget": 4})
