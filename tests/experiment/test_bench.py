"""Comparisons: grids, tuning, scheduling, figures, and one small grid from end to end."""

from __future__ import annotations

import csv
import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats

from fedclip.errors import UsageError
from fedclip.experiment.bench import command
from fedclip.experiment.bench.grid import load_grid
from fedclip.experiment.bench.plan import Cell, Plan, make_plan
from fedclip.experiment.bench.result import code_of, commit, present_code, result
from fedclip.experiment.bench.runner import Failed, Finished, Outcome, ProcessRunner
from fedclip.experiment.bench.schedule import Results, run_grid, slots_for
from fedclip.experiment.bench.statistics import (
    arm_figures,
    time_to_gain,
    total_bytes,
    worst_clients,
)
from tests.conftest import Command

ROOT = Path(__file__).parents[2]
GRID: dict[str, Any] = {
    "config": "base.yaml",
    "overrides": ["federation.rounds=2"],
    "seeds": [0, 1, 2],
    "tune": {"client.learning_rate": [0.1, 0.01]},
    "tuning": {"seeds": [8, 9], "overrides": ["federation.rounds=1"], "budget": 2},
    "reference": "plain",
    "arms": {
        "plain": None,
        "prox": {
            "overrides": ["client.proximal_mu=0.1"],
            "tune": {"client.learning_rate": [0.5]},
        },
    },
    "full": {"seeds": [0, 1, 2, 3], "overrides": ["federation.rounds=7"]},
}


def written(folder: Path, **changes: Any) -> Path:
    """A grid file with its configuration beside it."""
    (folder / "base.yaml").write_text("data: {name: digits}\nfederation: {rounds: 30}\n")
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(GRID | changes, sort_keys=False))
    return file


RATE = "client.learning_rate"


def rate(cell: Cell) -> float:
    return cell.values[RATE]


def finished(
    cell: Cell, accuracy: float = 0.5, hits: list[int] | None = None, **more: Any
) -> Finished:
    summary = {
        "accuracy": accuracy,
        "zero_shot_accuracy": 0.25,
        "validation_accuracy": accuracy,
        "validation_loss": 1 - accuracy,
        "client_accuracy": {"mean": 0.5, "min": 0.25, "max": 0.75},
        "bytes_up_per_client_round": 1000,
        "bytes_down_per_client_round": 2000,
        "clients_per_round": 5,
        "rounds": 2,
        "seconds": 4.0,
    }
    return Finished(cell, summary | more, measured={"peak_memory_bytes": 10**9}, hits=hits)


class Stub:
    """Stands in for the processes: gives what `figure` says, and remembers what it was asked."""

    def __init__(self, figure: Callable[[Cell], Outcome]) -> None:
        self.figure = figure
        self.cells: list[Cell] = []

    def __call__(self, cell: Cell) -> Outcome:
        self.cells.append(cell)
        return self.figure(cell)

    def asked(self) -> list[tuple[str, int, float]]:
        return sorted((c.arm, c.seed, rate(c)) for c in self.cells)


# --- the grid file ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tuning": {"sed": 1}}, "unknown key tuning.sed; known keys: seeds, overrides, budget"),
        ({"arms": {"a": {"rate": 1}}}, "unknown key arms.a.rate; known keys: overrides, tune"),
        ({"tuning": {"seed": 1}}, "tuning.seed is tuning.seeds, a list of at least two now"),
        ({"arms": {"a": {"rates": [1]}}}, "arms.a.rates is tune: {client.learning_rate: [...]}"),
        ({"tuning": {"seeds": [1]}}, "tuning.seeds: "),
        ({"tuning": {"seeds": [8, 8]}}, "tuning.seeds: name two different seeds"),
        ({"tune": {"client.learning_rate": []}}, "tune.client.learning_rate: "),
        ({"tune": {"rate": [1]}}, "must be a key of the configuration, such as"),
        ({"tune": {"client.learning_rate": [1, 2, 3]}}, "3 values are more than tuning.budget, 2"),
        (
            {"arms": {"a": {"overrides": ["client.learning_rate=1"]}}, "reference": []},
            "arms.a.overrides: client.learning_rate is tuned; name it in one place",
        ),
        ({"over": {"data.partition.alpha": []}}, "over.data.partition.alpha: "),
        ({"over": {"data.partition.alpha": [1, 1]}}, "over: two combinations would have one name"),
        ({"colour": 1}, "unknown key colour; known keys: config, overrides"),
        ({"arms": {"a/b": None}}, "arms.a/b must be letters, digits"),
        ({"overrides": ["rounds"]}, "overrides.0 must be key=value"),
        ({"reference": "lost"}, "reference: no arm 'lost'; arms: plain, prox"),
        ({"seeds": [0, 9]}, "tuning.seeds: 9 is one of the seeds"),
        ({"tune": {"client.learning_rate": [-1]}}, "greater than or equal to 0"),
        ({"seeds": []}, "seeds: "),
    ],
)
def test_what_a_grid_file_may_not_say(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    file = written(tmp_path, **changes)
    with pytest.raises(UsageError) as error:
        load_grid(file)
    assert said in str(error.value)
    assert str(file) in str(error.value)


def test_several_problems_come_together(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text("arms: {a: {rate: 1}}\ncolour: 2\n")
    with pytest.raises(UsageError, match=r"3 problems(.|\n)*config is missing(.|\n)*\(line 2\)"):
        load_grid(file)


@pytest.mark.parametrize("name", [p.stem for p in sorted((ROOT / "configs/bench").glob("*.yaml"))])
def test_every_arm_of_the_shipped_grids_is_valid(name: str) -> None:
    plan = make_plan(ROOT / f"configs/bench/{name}.yaml")
    assert {arm: plan.problem(arm) for arm in plan.arms} == dict.fromkeys(plan.arms)
    first = next(iter(plan.grid.arms))
    full = make_plan(ROOT / f"configs/bench/{name}.yaml", full=True, only=[first])
    assert full.problem(next(iter(full.arms))) is None
    arm = next(iter(plan.arms))
    assert len(full.cells(arm, {})[0].overrides) >= len(plan.cells(arm, {})[0].overrides)


# --- the plan ---


def test_cells_and_what_they_are_told(tmp_path: Path) -> None:
    plan = make_plan(written(tmp_path))
    assert plan.arms["plain"].knobs == {RATE: (0.01, 0.1)}  # ascending
    first, second = plan.tuning_cells("plain", {RATE: 0.01})
    assert (first.seed, second.seed) == (8, 9)
    assert first.overrides == (
        "data.test_seed=0", "evaluation.keep_hits=true", "federation.rounds=2",
        "federation.rounds=1",
        "client.learning_rate=0.01", "seed=8",
    )  # fmt: skip
    assert plan.arms["prox"].tuned == []  # one value: nothing to choose
    cells = plan.cells("prox", {RATE: 0.5})
    assert [c.seed for c in cells] == [0, 1, 2]
    assert cells[0].overrides[3] == "client.proximal_mu=0.1"
    assert str(first) == "plain tuning seed 8 lr 0.01"


def test_factors_make_arms_of_every_combination(tmp_path: Path) -> None:
    over = {"data.partition.alpha": [0.1, 0.5], "client.local_epochs": [1, 5]}
    plan = make_plan(written(tmp_path, over=over))
    assert list(plan.arms)[:3] == [
        "plain.alpha-0.1.local_epochs-1", "prox.alpha-0.1.local_epochs-1",
        "plain.alpha-0.1.local_epochs-5",
    ]  # fmt: skip
    assert len(plan.arms) == 8
    arm = plan.arms["prox.alpha-0.5.local_epochs-1"]
    assert arm.overrides[:2] == ("data.partition.alpha=0.5", "client.local_epochs=1")
    assert plan.problem(arm.name) is None
    few = make_plan(tmp_path / "mine.yaml", only=["prox"])
    assert len(few.arms) == 4
    assert list(make_plan(tmp_path / "mine.yaml", only=[arm.name]).arms) == [arm.name]


def test_arms_that_are_judged_on_other_images_are_refused(tmp_path: Path) -> None:
    arms = {"plain": None, "other": {"overrides": ["evaluation.max_examples=7"]}}
    with pytest.raises(UsageError, match=r"plain and other cannot be compared: evaluation.max"):
        make_plan(written(tmp_path, arms=arms))


def test_several_tasks_share_their_test_sets_too(tmp_path: Path) -> None:
    file = written(tmp_path)
    (tmp_path / "base.yaml").write_text((ROOT / "configs/tasks.yaml").read_text())
    plan = make_plan(file)
    assert plan.problem("plain") is None
    overrides = plan.cells("plain", {RATE: 0.1})[0].overrides
    assert overrides[0].startswith("tasks.")
    assert overrides[0].endswith(".test_seed=0")


def test_full_only_and_seeds(tmp_path: Path) -> None:
    file = written(tmp_path)
    full = make_plan(file, full=True)
    assert full.seeds == (0, 1, 2, 3)
    assert full.cells("plain", {RATE: 0.1})[0].overrides[2:4] == (
        "federation.rounds=2", "federation.rounds=7",
    )  # fmt: skip
    assert list(make_plan(file, only=["prox"]).arms) == ["prox"]
    assert make_plan(file, full=True, seeds=[5, 5, 4]).seeds == (5, 4)
    with pytest.raises(UsageError, match="no arm nobody in"):
        make_plan(file, only=["nobody"])
    with pytest.raises(UsageError, match="9 is a seed of tuning"):
        make_plan(file, seeds=[9])


def test_names_follow_from_what_a_run_is_told(tmp_path: Path) -> None:
    def name(**changes: Any) -> str:
        return make_plan(written(tmp_path, **changes)).cells("plain", {RATE: 0.1})[0].name

    usual = name()
    assert usual.startswith("plain-seed0-")
    assert name(overrides=["federation.rounds=2", "data.name=digits"]) == usual  # the same run
    assert name(overrides=["federation.rounds=3"]) != usual
    (tmp_path / "base.yaml").write_text("federation: {rounds: 31}\n")
    other = make_plan(tmp_path / "mine.yaml").cells("plain", {RATE: 0.1})[0].name
    assert other != name(overrides=["federation.rounds=3"])


# --- tuning ---


def test_seeds_run_at_the_value_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    plan = make_plan(written(tmp_path))
    # Test accuracy says the opposite: it must not be looked at.
    stub = Stub(lambda c: finished(c, 0.4 if rate(c) == 0.1 else 0.9,
                                   validation_loss=0.1 if rate(c) == 0.1 else 0.6))  # fmt: skip
    results = run_grid(plan, stub, tmp_path, jobs=2)
    tuning = [("plain", seed, value) for seed in (8, 9) for value in (0.01, 0.1)]
    seeds = [("plain", seed, 0.1) for seed in (0, 1, 2)]
    assert stub.asked() == sorted([*tuning, *seeds, *(("prox", s, 0.5) for s in (0, 1, 2))])
    assert results.failures == {}
    assert results.tuning_runs("plain") == 4
    told = json.loads((tmp_path / "tuning.json").read_text())["plain"]["knobs"][RATE]
    assert told["losses"] == {"0.01": pytest.approx(0.6), "0.1": pytest.approx(0.1)}
    assert told["edge"] == "highest"


def test_a_diverged_value_is_out_and_an_accident_leaves_the_choice_open(tmp_path: Path) -> None:
    plan = make_plan(written(tmp_path), only=["plain"])

    def diverged(c: Cell) -> Outcome:
        return Failed(c, "nan", diverged=True) if rate(c) == 0.1 else finished(c)

    results = run_grid(plan, Stub(diverged), tmp_path, jobs=1)
    assert results.choices["plain"].knobs[RATE].losses["0.1"] is None
    assert set(results.of("plain")) == {0, 1, 2}

    def accident(c: Cell) -> Outcome:
        return Failed(c, "no room") if (rate(c), c.seed) == (0.1, 9) else finished(c)

    results = run_grid(plan, Stub(accident), tmp_path, jobs=1)
    assert "not all tuning runs" in results.failures["plain"][1]
    assert results.of("plain") == {}
    everything = run_grid(plan, Stub(lambda c: Failed(c, "nan", True)), tmp_path, jobs=1)
    assert "diverged at every client.learning_rate" in everything.failures["plain"][0]
    blind = run_grid(plan, Stub(lambda c: finished(c, validation_loss=None)), tmp_path, jobs=1)
    assert "no validation examples" in blind.failures["plain"][0]


@pytest.mark.parametrize("text", ["[", '{"starts": 3}', '{"starts": [{"seconds": "1"}]}', "[1]"])
def test_a_damaged_measurement_counts_for_nothing(tmp_path: Path, text: str) -> None:
    runner, c = ProcessRunner(tmp_path / "x.yaml", tmp_path), Cell("a", 9, 0.1, True, (), "0")
    (tmp_path / f"{c.name}.bench.json").write_text(text)
    assert runner._record(c) == []


# --- failures and scheduling ---


def test_a_failure_does_not_stop_the_others(tmp_path: Path) -> None:
    arms = GRID["arms"] | {"wrong": {"overrides": ["model.lora.q=1"], "tune": {RATE: [1]}}}
    plan = make_plan(written(tmp_path, arms=arms))
    stub = Stub(lambda c: Failed(c, "no room") if (c.arm, c.seed) == ("prox", 1) else finished(c))
    results = run_grid(plan, stub, tmp_path, jobs=2)
    assert set(results.of("prox")) == {0, 2}
    assert set(results.of("plain")) == {0, 1, 2}
    assert results.failures["prox"] == ["prox seed 1 lr 0.5: no room"]
    assert "unknown key model.lora.q" in results.failures["wrong"][0]
    assert "wrong" not in {c.arm for c in stub.cells}


def test_no_more_runs_at_once_than_allowed(tmp_path: Path) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def slow(c: Cell) -> Outcome:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return finished(c)

    plan = make_plan(
        written(tmp_path, seeds=list(range(9))[:9], tuning={"seeds": [98, 99]}, tune={})
    )
    run_grid(plan, slow, tmp_path, jobs=3)
    assert most == 3


def test_memory_limits_the_runs_at_once() -> None:
    assert slots_for(cores=8, free_bytes=10e9, run_bytes=3e9) == 3
    assert slots_for(cores=2, free_bytes=10e9, run_bytes=3e9) == 2
    assert slots_for(cores=8, free_bytes=1e9, run_bytes=3e9) == 1


def test_ctrl_c_ends_the_running_processes(tmp_path: Path) -> None:
    stopped: list[bool] = []

    def interrupted(c: Cell) -> Outcome:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_grid(make_plan(written(tmp_path)), interrupted, tmp_path, jobs=1,
                 stop=lambda: stopped.append(True))  # fmt: skip
    assert stopped == [True]


# --- figures ---


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    plan = make_plan(written(tmp_path, tune={}))
    # Both arms vary much from seed to seed, but their difference does not.
    level = {0: 0.2, 1: 0.5, 2: 0.8}
    apart = {0: 0.09, 1: 0.1, 2: 0.11}
    stub = Stub(lambda c: finished(c, level[c.seed] + (apart[c.seed] if c.arm == "prox" else 0)))
    rows = arm_figures(plan, run_grid(plan, stub, tmp_path, jobs=1))
    assert list(rows) == ["prox", "plain"]  # best first
    minus = rows["prox"]["minus"]["plain"]
    assert minus["mean"] == pytest.approx(0.1)
    assert minus["ci95"] == pytest.approx(4.302653 * 0.01 / math.sqrt(3))
    assert minus["p"] == pytest.approx(stats.ttest_1samp([0.09, 0.1, 0.11], 0).pvalue)
    assert (minus["seeds"], minus["verdict"], minus["p_holm"]) == (3, "better", minus["p"])
    assert (minus["corrected_low"], minus["corrected_high"]) == (minus["low"], minus["high"])
    assert minus["ratio"]["mean"] == pytest.approx(0.6 / 0.5)
    assert rows["plain"]["minus"] == {}
    assert rows["plain"]["gain"]["mean"] == pytest.approx(0.25)
    assert rows["plain"]["accuracy"]["ci95"] is not None
    assert rows["plain"]["accuracy"]["low"] == 0.0  # 0.5 - 4.3 * 0.3 / sqrt(3) lies below
    assert rows["plain"]["accuracy"]["high"] == 1.0


@pytest.mark.parametrize(
    ("arms", "figure", "reason"),
    [
        ({}, {}, "client.learning_rate of prox was not tuned"),
        ({"prox": {"tune": {RATE: [0.1, 0.2]}}}, {}, "the best client.learning_rate of prox is"),
        (
            {"plain": {"tune": {RATE: [0.1]}}, "prox": {"overrides": ["federation.ditto_mu=1"]}},
            {"personal": True},
            "personalised and shared models are not compared",
        ),
    ],
)
def test_who_takes_part_in_no_claim(
    tmp_path: Path, arms: dict[str, Any], figure: dict[str, Any], reason: str
) -> None:
    plan = make_plan(written(tmp_path, arms=GRID["arms"] | arms,
                             tuning={"seeds": [8, 9], "budget": 3}))  # fmt: skip

    def run(c: Cell) -> Outcome:
        if c.arm == "plain":
            return finished(c, 0.5 - 0.1 * abs(math.log10(rate(c) / 0.03)))
        return finished(c, 0.5 + 0.01 * c.seed + rate(c) / 10, **figure)

    rows = arm_figures(plan, run_grid(plan, Stub(run), tmp_path, jobs=1))
    minus = rows["prox"]["minus"]["plain"]
    assert minus["excluded"].startswith(reason)
    assert minus["verdict"] is None


def test_the_error_of_the_test_images_is_part_of_a_difference(tmp_path: Path) -> None:
    """100 images, of which one arm has 60 and the other 50 right, 40 of them the same."""
    plan = make_plan(written(tmp_path, tune={}))
    plain = [1] * 50 + [0] * 50
    prox = [1] * 40 + [0] * 10 + [1] * 20 + [0] * 30
    stub = Stub(lambda c: finished(c, 0.6 if c.arm == "prox" else 0.5,
                                   hits=prox if c.arm == "prox" else plain))  # fmt: skip
    rows = arm_figures(plan, run_grid(plan, stub, tmp_path, jobs=1))
    minus = rows["prox"]["minus"]["plain"]
    # Differences are 1, 0, -1 in 20, 70, 10 images: variance (30 - 100 * 0.1^2) / 100 = 0.29.
    assert minus["image_error"] == pytest.approx(math.sqrt(0.29 / 100), rel=0.1)
    assert minus["ci95"] == pytest.approx(1.96 * minus["image_error"], rel=1e-3)
    assert minus["verdict"] == "tie"  # though all seeds agree


def test_time_to_a_share_of_the_gain() -> None:
    accuracies = [0.5, 0.6, 0.94, 0.96, 1.0]  # 95 % of the gain: 0.975
    metrics = [
        {"server_round": n, "accuracy": a, "bytes_up": 10 * n, "bytes_down": n}
        for n, a in enumerate(accuracies)
    ]
    timing = [{"server_round": n, "seconds": 10.0 + n} for n in range(5)]
    assert time_to_gain(metrics, timing, 0.95) == {
        "rounds_to_95": 4, "seconds_to_95": 11 + 12 + 13 + 14, "bytes_to_95": 11 * 10,
    }  # fmt: skip
    assert time_to_gain(metrics, timing, 0.8)["rounds_to_95"] == 2  # 0.9
    nothing = dict.fromkeys(("rounds_to_95", "seconds_to_95", "bytes_to_95"))
    assert time_to_gain(metrics[:1], timing, 0.95) == nothing
    assert time_to_gain(metrics[::-1], timing, 0.95) == nothing  # nothing was gained
    metrics[1] = {"server_round": 1, "loss": 2.0}  # a round that was not evaluated
    assert time_to_gain(metrics, timing, 0.95) == nothing


def test_the_tenth_of_the_clients_that_is_worst_off() -> None:
    many = {f"client-{i:02}": i / 100 for i in range(11)} | {"empty": None}
    assert worst_clients([{"accuracy_by_client": many}]) == pytest.approx(0.005)  # 0 and 0.01
    assert worst_clients([{"accuracy_by_client": {"a": 0.5, "b": 0.7}}]) == 0.5
    assert worst_clients([]) is None
    assert worst_clients([{"accuracy_by_client": {"a": None}}]) is None


def test_bytes_of_a_run() -> None:
    run = finished(Cell("a", 9, {}, True, (), "0"))
    assert total_bytes(run) == (1000 + 2000) * 5 * 2
    lines = [
        {"server_round": 0},
        {"bytes_up": 7, "bytes_down": 5},
        {"bytes_up": 1, "bytes_down": 2},
    ]
    assert total_bytes(Finished(run.cell, run.summary, lines)) == 15


# --- the command ---


def bench(file: Path, work: Path, stub: Stub, **options: Any) -> int:
    return command.bench(file, work, jobs=1, run_cell=stub, **options)


@pytest.mark.usefixtures("pixels")
def test_tables_plots_and_result_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub = Stub(lambda c: finished(c, 0.9 if rate(c) == 0.1 else 0.4))
    target = tmp_path / "results" / "mine.json"
    assert bench(written(tmp_path), tmp_path / "work", stub, result_file=target) == 0
    out, err = capsys.readouterr()
    assert "0.900 ± 0.000" in out
    assert "minus plain" in out
    assert "no claim" in out
    assert "! plain: lr 0.1 is the highest value tried; a higher one may be better" in err
    assert "plain tuning seed 8 lr 0.01: begins" in err
    assert "at most 0 s left" in err
    result = json.loads(target.read_text())
    assert result == json.loads((tmp_path / "work/result.json").read_text())
    assert result["figures"]["accuracy_plain"] == pytest.approx(0.9)
    assert result["figures"]["accuracy_prox_minus_plain"] == pytest.approx(-0.5)
    losses = result["details"]["arms"]["plain"]["tuning"][RATE]["losses"]
    assert losses == {"0.01": pytest.approx(0.6), "0.1": pytest.approx(0.1)}
    assert str(tmp_path) not in json.dumps(result["machine"])
    for name in ("accuracy", "bytes"):
        assert (tmp_path / "work" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (tmp_path / "work" / f"{name}.svg").read_bytes()
    page, paper, sheet = (
        (tmp_path / "work" / f"accuracy.{form}").read_text() for form in ("md", "tex", "csv")
    )
    assert "| plain | 3       | 0.900 ± 0.000" in page
    assert "\\toprule" in paper
    assert "0.900 $\\pm$ 0.000" in paper
    assert [row[0] for row in csv.reader(sheet.splitlines())] == ["arm", "plain", "prox"]


@pytest.mark.usefixtures("pixels")
def test_a_grid_with_factors_has_a_table_and_a_plot_of_arms_by_factor(tmp_path: Path) -> None:
    """An arm's runs at a factor are a cell; one that has failed is a gap."""

    def outcome(cell: Cell) -> Finished | Failed:
        if cell.arm.startswith("prox") and cell.arm.endswith("0.5"):
            return Failed(cell, "too much")
        return finished(cell, 0.9 if cell.arm.startswith("plain") else 0.4)

    arms = {"plain": None, "prox": {"overrides": ["client.proximal_mu=0.1"]}}
    over = {"data.partition.alpha": [0.1, 0.5]}
    grid = written(tmp_path, tune={}, arms=arms, over=over)
    assert bench(grid, tmp_path / "work", Stub(outcome)) == 1
    sheet = (tmp_path / "work" / "crossed.csv").read_text()
    assert [*csv.reader(sheet.splitlines())] == [
        ["arm", "0.1", "0.5"], ["plain", "0.900", "0.900"], ["prox", "0.400", "-"]
    ]  # fmt: skip
    assert (tmp_path / "work" / "crossed.png").read_bytes().startswith(b"\x89PNG")
    assert "Accuracy, arms by factors" in (tmp_path / "work" / "report.html").read_text()


@pytest.mark.usefixtures("pixels")
def test_classes_that_nothing_is_chosen_by_or_tested_on_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gaps = {"classes_not_tested": ["emu"], "classes_not_validated": ["cat", "dog"]}
    bench(written(tmp_path), tmp_path / "work", Stub(lambda c: finished(c, **gaps)))
    err = capsys.readouterr().err
    assert "warning: 1 classes have no test image: emu (in prox seed 0 lr" in err
    assert "warning: 2 classes have no validation image: cat, dog (in plain tuning seed 8 lr" in err
    for ended, told in ((None, False), ("evaluation.patience: no better", True)):
        gaps = {"classes_not_validated": ["cat"], "stopped_by": ended}
        run = finished(Cell("a", 0, {}, False, (), "0"), **gaps)
        assert any("no validation" in text for text in command._gaps(Results([run]))) == told


def test_json_and_exit_code_after_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = Stub(lambda c: Failed(c, "no room") if c.arm == "prox" else finished(c))
    assert bench(written(tmp_path), tmp_path / "work", stub, as_json=True) == 1
    out, err = capsys.readouterr()
    assert list(json.loads(out)["details"]["arms"]) == ["plain"]
    assert "failed: prox: prox seed 0 lr 0.5: no room" in err


def test_dry_run_lists_and_runs_nothing(fedclip: Command, tmp_path: Path) -> None:
    file = written(tmp_path)
    code, out, _ = fedclip("bench", "--grid", file, "--work", tmp_path / "work", "--dry-run")
    assert code == 0
    assert "plain tuning seed 8 lr 0.01: fedclip run" in out
    assert "plain: 2 values of each of lr, then seeds 0, 1, 2 at the best" in out
    assert "prox seed 2 lr 0.5: fedclip run" in out
    assert "10 runs of 2 arms at most" in out
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "takes one grid"),
        (["strategies", "--grid", "a.yaml"], "takes one grid"),
        (["nothing"], "there is no ready configuration 'bench/nothing'"),
        (["missing.yaml"], "there is no configuration file missing.yaml"),
        (["strategies", "--seeds", "1,x"], "--seeds must be whole numbers"),
        (["strategies", "--jobs", "0"], "--jobs must be at least 1"),
    ],
)
def test_what_the_command_refuses(fedclip: Command, arguments: list[str], said: str) -> None:
    code, _, err = fedclip("bench", *arguments)
    assert code == 2
    assert said in err


def test_no_commit_outside_a_checkout(tmp_path: Path) -> None:
    assert commit(tmp_path) is None


# --- real processes ---


def small(folder: Path) -> Plan:
    settings = [
        "model.model_name=random:tiny", "federation.rounds=1", "federation.num_clients=2",
        "data.max_train_examples=40", "evaluation.max_examples=8",
        "data.partition.name=iid",
    ]  # fmt: skip
    arms = {"plain": None, "prox": {"overrides": ["client.proximal_mu=0.1"]}}
    return make_plan(written(folder, overrides=settings, seeds=[0], arms=arms,
                             tune={RATE: [0.01]}))  # fmt: skip


def test_a_small_grid_from_end_to_end(tmp_path: Path) -> None:
    small(tmp_path)
    assert command.bench(tmp_path / "mine.yaml", tmp_path / "work", jobs=2) == 0
    runs = tmp_path / "work/runs"
    [record] = runs.glob("prox*.bench.json")
    start = json.loads(record.read_text())["starts"][0]
    assert start["exit_code"] == 0
    assert 50e6 < start["peak_memory_bytes"] < 50e9
    row = json.loads((tmp_path / "work/result.json").read_text())["details"]["arms"]["prox"]
    assert row["runs"][0]["seed"] == 0
    plan = make_plan(tmp_path / "mine.yaml")
    [cell] = plan.cells("prox", {RATE: 0.01})
    outcome = ProcessRunner(plan.config, runs)(cell)
    assert isinstance(outcome, Finished)
    assert outcome.hits is not None
    assert len(outcome.hits) == outcome.metrics[-1]["test_examples"] == 8
    assert sum(outcome.hits) / 8 == outcome.summary["accuracy"]
    assert row["rounds"] == 1
    # Finished runs are read, not run again.
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.json*")}
    assert command.bench(tmp_path / "mine.yaml", tmp_path / "work", jobs=2) == 0
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.json*")} == before


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    plan = small(tmp_path)
    [cell] = plan.cells("plain", {RATE: 0.01})
    (tmp_path / "runs" / cell.name).write_text("in the way")
    outcome = ProcessRunner(plan.config, tmp_path / "runs")(cell)
    assert isinstance(outcome, Failed)
    assert "is a file; choose another --output" in outcome.reason
    assert not outcome.diverged


def test_a_result_names_the_code_that_began_its_runs(tmp_path: Path) -> None:
    """Finished runs are read, not repeated, when fedclip has changed since."""
    assert code_of(tmp_path) == present_code()
    other = {"commit": "abc", "code": present_code()["code"] | {"lora": "another"}}
    (tmp_path / "code.json").write_text(json.dumps(other))
    found = result("x", {}, {}, code_of(tmp_path))
    assert (found["commit"], found["code"]["lora"]) == ("abc", "another")
