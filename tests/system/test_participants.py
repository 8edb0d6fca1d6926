"""The benchmark of participants: which cells count, and what figures come of them."""

from __future__ import annotations

import pytest

from benchmarks.participants import (
    ATTACKS,
    DIVISIONS,
    RULES,
    config_of,
    figures_of,
    grid,
    lost,
    lost_figures,
    needed,
    table,
    whole_seeds,
)

BOTH = list(DIVISIONS)


def cells(seeds: int) -> dict[str, dict[str, float]]:
    """Accuracies that tell where they are from: the mean falls under attack, rules lose a bit."""
    found = {}
    for attack, rule, division, seed in grid(BOTH, seeds):
        accuracy = 0.9 + 0.02 * seed
        accuracy -= {"mean": 0.8 if attack != "none" else 0.0, "multi_krum": 0.03}.get(rule, 0.01)
        accuracy -= 0.02 * (division == "iid" and rule == "multi_krum")
        name = " | ".join((attack, rule, division, str(seed)))
        found[name] = {"accuracy": accuracy, "zero_shot": 0.8}
    return found


def test_figures_are_of_the_worst_division_and_paired_by_seed() -> None:
    found = cells(2)
    tables = table(found, [0, 1], lambda line: line["accuracy"])
    assert tables["iid"]["mean"]["none"] == pytest.approx(0.91)
    figures = figures_of(tables)
    assert figures["undefended_ratio"] == pytest.approx(0.11 / 0.91)
    assert figures["defended_min_ratio"] == pytest.approx(0.86 / 0.91)
    points = lost(found, BOTH)
    assert points["multi_krum"] == {
        "dirichlet 0.3": pytest.approx([3, 3]),
        "iid": pytest.approx([5, 5]),
    }
    told = lost_figures(points)
    assert told["no_attack_loss_points"] == told["no_attack_loss_points_multi_krum"]
    assert told["no_attack_loss_points"] == pytest.approx(5)
    assert told["no_attack_loss_points_median"] == pytest.approx(1)


def test_a_seed_counts_where_every_cell_of_a_figure_is_there() -> None:
    found = cells(3)
    del found["ipm 0.5 | median | iid | 0"], found["alie 1.5 | krum | iid | 0"]
    assert whole_seeds(found, BOTH) == [0, 1, 2]
    del found["alie 1.5 | rfa | iid | 1"], found["none | mean | iid | 1"]
    assert whole_seeds(found, BOTH) == [0, 2]
    shown = table(found, [0, 2], lambda line: line["accuracy"])
    assert table(found, [0, 2], lambda line: 1, sum)["iid"]["median"]["ipm 0.5"] == 1
    assert shown["iid"]["rfa"].keys() == ATTACKS.keys()
    assert len(lost(found, BOTH)["rfa"]["iid"]) == 2  # no pair of seed 1
    assert needed("krum") == ()


def test_every_cell_is_a_valid_run() -> None:
    for attack, rule in [*((a, "median") for a in ATTACKS), *(("none", r) for r in RULES)]:
        config = config_of(attack, rule, "iid", 1)
        assert config.attack.clients == 3
        assert (config.robust.attackers == 3) == (rule != "mean")
