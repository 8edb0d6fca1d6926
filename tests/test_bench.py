"""Comparisons: grids, tuning, scheduling, figures, and one small grid from end to end."""

from __future__ import annotations

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
from fedclip.experiment.bench import command, schedule
from fedclip.experiment.bench.grid import load_grid
from fedclip.experiment.bench.plan import Cell, Plan, make_plan
from fedclip.experiment.bench.result import commit
from fedclip.experiment.bench.runner import Failed, Finished, Outcome, ProcessRunner
from fedclip.experiment.bench.schedule import choose, run_grid, slots_for
from fedclip.experiment.bench.statistics import arm_figures, interval, time_to_share, total_bytes
from tests.conftest import Command

ROOT = Path(__file__).parents[1]
GRID: dict[str, Any] = {
    "config": "base.yaml",
    "overrides": ["federation.rounds=2"],
    "seeds": [0, 1, 2],
    "tuning": {"seed": 9, "overrides": ["federation.rounds=1"], "rates": [0.1, 0.01]},
    "reference": "plain",
    "arms": {"plain": None, "prox": {"overrides": ["client.proximal_mu=0.1"], "rates": [0.5]}},
    "full": {"seeds": [0, 1, 2, 3], "overrides": ["federation.rounds=7"]},
}


def written(folder: Path, **changes: Any) -> Path:
    """A grid file with its configuration beside it."""
    (folder / "base.yaml").write_text("data: {name: digits}\nfederation: {rounds: 30}\n")
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(GRID | changes))
    return file


def finished(cell: Cell, accuracy: float = 0.5, **more: Any) -> Finished:
    summary = {
        "accuracy": accuracy,
        "zero_shot_accuracy": 0.25,
        "validation_accuracy": accuracy,
        "client_accuracy": {"mean": 0.5, "min": 0.25, "max": 0.75},
        "bytes_up_per_client_round": 1000,
        "bytes_down_per_client_round": 2000,
        "clients_per_round": 5,
        "rounds": 2,
        "seconds": 4.0,
    }
    return Finished(cell, summary | more, measured={"peak_memory_bytes": 10**9})


class Stub:
    """Stands in for the processes: gives what `figure` says, and remembers what it was asked."""

    def __init__(self, figure: Callable[[Cell], Outcome]) -> None:
        self.figure = figure
        self.cells: list[Cell] = []

    def __call__(self, cell: Cell) -> Outcome:
        self.cells.append(cell)
        return self.figure(cell)

    def asked(self) -> list[tuple[str, int, float | None]]:
        return sorted((c.arm, c.seed, c.rate) for c in self.cells)


# --- the grid file ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tuning": {"sed": 1}}, "unknown key tuning.sed; known keys: seed, overrides, rates"),
        ({"arms": {"a": {"rate": 1}}}, "unknown key arms.a.rate; known keys: overrides, rates"),
        ({"colour": 1}, "unknown key colour; known keys: config, overrides"),
        ({"arms": {"a/b": None}}, "arms.a/b must be letters, digits"),
        ({"overrides": ["rounds"]}, "overrides.0 must be key=value"),
        ({"reference": "lost"}, "reference: no arm 'lost'; arms: plain, prox"),
        ({"seeds": [0, 9]}, "tuning.seed: 9 is one of the seeds"),
        (
            {"arms": {"a": {"rates": [0]}}},
            "arms.a.rates.0: input should be greater than or equal to 0.000000000001",
        ),
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


@pytest.mark.parametrize("name", ["strategies", "ranks", "guide_icons", "dynamic_ranks"])
def test_every_arm_of_the_shipped_grids_is_valid(name: str) -> None:
    plan = make_plan(ROOT / f"configs/bench/{name}.yaml")
    assert {arm: plan.problem(arm) for arm in plan.arms} == dict.fromkeys(plan.arms)
    full = make_plan(ROOT / f"configs/bench/{name}.yaml", full=True)
    assert full.problem(next(iter(full.arms))) is None
    arm = next(iter(plan.arms))
    assert full.cells(arm, None)[0].overrides != plan.cells(arm, None)[0].overrides


# --- the plan ---


def test_cells_and_what_they_are_told(tmp_path: Path) -> None:
    plan = make_plan(written(tmp_path))
    low, high = plan.tuning_cells("plain")
    assert (low.rate, high.rate) == (0.01, 0.1)  # ascending
    assert low.overrides == (
        "federation.rounds=2", "federation.rounds=1", "client.learning_rate=0.01", "seed=9",
    )  # fmt: skip
    assert plan.tuning_cells("prox") == []  # one rate: nothing to choose
    assert [c.seed for c in plan.cells("prox", 0.5)] == [0, 1, 2]
    assert plan.cells("prox", 0.5)[0].overrides[1] == "client.proximal_mu=0.1"


def test_full_only_and_seeds(tmp_path: Path) -> None:
    file = written(tmp_path)
    full = make_plan(file, full=True)
    assert full.seeds == (0, 1, 2, 3)
    assert full.cells("plain", 0.1)[0].overrides[:2] == (
        "federation.rounds=2", "federation.rounds=7",
    )  # fmt: skip
    assert list(make_plan(file, only=["prox"]).arms) == ["prox"]
    assert make_plan(file, full=True, seeds=[5, 5, 4]).seeds == (5, 4)
    with pytest.raises(UsageError, match="no arm nobody in"):
        make_plan(file, only=["nobody"])
    with pytest.raises(UsageError, match="9 is the seed of tuning"):
        make_plan(file, seeds=[9])


def test_names_follow_from_what_a_run_is_told(tmp_path: Path) -> None:
    def name(**changes: Any) -> str:
        return make_plan(written(tmp_path, **changes)).cells("plain", 0.1)[0].name

    usual = name()
    assert usual.startswith("plain-seed0-lr0.1-")
    assert name(overrides=["federation.rounds=2", "data.name=digits"]) == usual  # the same run
    assert name(overrides=["federation.rounds=3"]) != usual
    (tmp_path / "base.yaml").write_text("federation: {rounds: 31}\n")
    other = make_plan(tmp_path / "mine.yaml").cells("plain", 0.1)[0].name
    assert other != name(overrides=["federation.rounds=3"])


# --- tuning ---


def cell(rate: float, arm: str = "a") -> Cell:
    return Cell(arm, 9, rate, True, (), "0")


def test_the_rate_of_the_highest_validation_accuracy_is_chosen() -> None:
    def accurate(rate: float, validation: float) -> Outcome:
        # Test accuracy says the opposite: it must not be looked at.
        return finished(cell(rate), accuracy=1 - validation, validation_accuracy=validation)

    outcomes = [accurate(0.3, 0.5), accurate(0.1, 0.5), accurate(0.2, 0.7)]
    choice = choose("a", outcomes)
    assert isinstance(choice, schedule.Choice)
    assert (choice.rate, choice.edge) == (0.2, None)
    assert choice.validation == {"0.1": 0.5, "0.2": 0.7, "0.3": 0.5}
    low = choose("a", [accurate(0.3, 0.5), accurate(0.1, 0.5)])  # the lower of equals
    assert isinstance(low, schedule.Choice)
    assert (low.rate, low.edge) == (0.1, "lowest")
    high = choose("a", [accurate(0.1, 0.5), accurate(0.2, 0.6)])
    assert isinstance(high, schedule.Choice)
    assert high.edge == "highest"


def test_divergence_rules_a_rate_out_and_an_accident_leaves_the_choice_open() -> None:
    diverged = Failed(cell(0.9), "the loss became nan", diverged=True)
    choice = choose("a", [finished(cell(0.1)), diverged])
    assert isinstance(choice, schedule.Choice)
    assert (choice.rate, choice.validation["0.9"]) == (0.1, None)
    assert "not all tuning runs" in str(choose("a", [finished(cell(0.1)), Failed(cell(1), "x")]))
    assert "at every learning rate" in str(choose("a", [diverged]))
    blind = finished(cell(0.1), validation_accuracy=None)
    assert "no validation examples" in str(choose("a", [blind]))


def test_seeds_run_at_the_chosen_rate_and_the_choice_is_kept(tmp_path: Path) -> None:
    plan = make_plan(written(tmp_path))
    stub = Stub(lambda c: finished(c, 0.9 if c.rate == 0.1 else 0.4))
    results = run_grid(plan, stub, tmp_path, jobs=2)
    seeds = [("plain", seed, 0.1) for seed in (0, 1, 2)]
    assert stub.asked() == sorted(
        [("plain", 9, 0.01), ("plain", 9, 0.1), *seeds, *(("prox", s, 0.5) for s in (0, 1, 2))]
    )
    assert results.failures == {}
    # Even where tuning would now say something else, the choice that was made holds.
    again = Stub(lambda c: finished(c, 0.9 if c.rate == 0.01 else 0.4))
    run_grid(plan, again, tmp_path, jobs=1)
    assert [a for a in again.asked() if a[0] == "plain"] == seeds
    # Other rates to try are another question.
    other = make_plan(written(tmp_path, tuning={"seed": 9, "rates": [0.1, 0.2]}))
    anew = Stub(lambda c: finished(c))
    run_grid(other, anew, tmp_path, jobs=1)
    assert ("plain", 9, 0.2) in anew.asked()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace('"rate": 0.1', '"rate": 0.7'),
        lambda text: text.replace('"rate": 0.1', '"rate": [1]'),
        lambda text: "[" * 100_000,
        lambda text: "\udc80",
    ],
)
def test_a_damaged_choice_of_rates_is_made_again(
    tmp_path: Path, damage: Callable[[str], str]
) -> None:
    plan = make_plan(written(tmp_path))
    run_grid(plan, Stub(lambda c: finished(c, 0.9 if c.rate == 0.1 else 0.4)), tmp_path, jobs=1)
    kept = tmp_path / "tuning.json"
    kept.write_text(damage(kept.read_text()), errors="surrogateescape")
    again = Stub(lambda c: finished(c, 0.9 if c.rate == 0.1 else 0.4))
    run_grid(plan, again, tmp_path, jobs=1)
    assert ("plain", 9, 0.1) in again.asked()


@pytest.mark.parametrize("text", ["[", '{"starts": 3}', '{"starts": [{"seconds": "1"}]}', "[1]"])
def test_a_damaged_measurement_counts_for_nothing(tmp_path: Path, text: str) -> None:
    runner, c = ProcessRunner(tmp_path / "x.yaml", tmp_path), Cell("a", 9, 0.1, True, (), "0")
    (tmp_path / f"{c.name}.bench.json").write_text(text)
    assert runner._record(c) == []


# --- failures and scheduling ---


def test_a_failure_does_not_stop_the_others(tmp_path: Path) -> None:
    arms = GRID["arms"] | {"wrong": {"overrides": ["model.lora.q=1"], "rates": [1]}}
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

    plan = make_plan(written(tmp_path, seeds=list(range(9))[:9], tuning={"seed": 99}))
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


def test_interval_by_hand() -> None:
    # Three values: t(0.975, 2) = 4.30265; the standard deviation of 1, 2, 3 is 1.
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["ci95"] == pytest.approx(4.302653 / math.sqrt(3))
    low, high = stats.ttest_1samp([1.0, 2.0, 3.0], 0).confidence_interval(0.95)
    assert found["ci95"] == pytest.approx((high - low) / 2)
    assert interval([0.5]) == {"mean": 0.5, "ci95": None}


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    plan = make_plan(written(tmp_path, tuning={"seed": 9, "rates": [0.1]}))
    # Both arms vary much from seed to seed, but their difference does not.
    level = {0: 0.2, 1: 0.5, 2: 0.8}
    stub = Stub(lambda c: finished(c, level[c.seed] + (0.1 if c.arm == "prox" else 0.0)))
    rows = arm_figures(plan, run_grid(plan, stub, tmp_path, jobs=1))
    assert list(rows) == ["prox", "plain"]  # best first
    minus = rows["prox"]["minus"]["plain"]
    assert minus["mean"] == pytest.approx(0.1)
    assert minus["ci95"] == pytest.approx(0, abs=1e-12)
    assert minus["seeds"] == 3
    assert rows["plain"]["minus"] == {}
    assert rows["plain"]["gain"]["mean"] == pytest.approx(0.25)
    assert rows["plain"]["accuracy"]["ci95"] == pytest.approx(4.302653 * 0.3 / math.sqrt(3))


def test_time_to_a_share_of_the_final_accuracy() -> None:
    accuracies = [0.1, 0.5, 0.94, 0.96, 1.0]
    metrics = [{"server_round": n, "accuracy": a} for n, a in enumerate(accuracies)]
    timing = [{"server_round": n, "seconds": 10.0 + n} for n in range(5)]
    assert time_to_share(metrics, timing, 0.95) == (3, 11 + 12 + 13)
    assert time_to_share(metrics[:1], timing, 0.95) == (0, 0)
    metrics[1] = {"server_round": 1, "loss": 2.0}  # a round that was not evaluated
    assert time_to_share(metrics, timing, 0.95) == (None, None)


def test_bytes_of_a_run() -> None:
    run = finished(cell(0.1))
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


def test_tables_plots_and_result_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub = Stub(lambda c: finished(c, 0.9 if c.rate == 0.1 else 0.4))
    target = tmp_path / "results" / "mine.json"
    assert bench(written(tmp_path), tmp_path / "work", stub, result_file=target) == 0
    out, err = capsys.readouterr()
    assert "0.900 ± 0.000" in out
    assert "minus plain" in out
    assert "! plain: 0.1 is the highest rate tried; a higher one may be better" in err
    result = json.loads(target.read_text())
    assert result == json.loads((tmp_path / "work/result.json").read_text())
    assert result["figures"]["accuracy_plain"] == pytest.approx(0.9)
    assert result["figures"]["accuracy_prox_minus_plain"] == pytest.approx(-0.5)
    assert result["details"]["arms"]["plain"]["tuning"] == {"0.01": 0.4, "0.1": 0.9}
    assert str(tmp_path) not in json.dumps(result["machine"])
    for name in ("accuracy.png", "bytes.png"):
        assert (tmp_path / "work" / name).read_bytes().startswith(b"\x89PNG")


def test_classes_that_nothing_is_chosen_by_or_tested_on_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gaps = {"classes_not_tested": ["emu"], "classes_not_validated": ["cat", "dog"]}
    bench(written(tmp_path), tmp_path / "work", Stub(lambda c: finished(c, **gaps)))
    err = capsys.readouterr().err
    assert "warning: 1 classes have no test image: emu (in prox seed 0 lr" in err
    assert "warning: 2 classes have no validation image: cat, dog (in plain tuning lr" in err


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
    assert "plain tuning lr 0.01: fedclip run" in out
    assert "plain: then seeds 0, 1, 2 at the best rate of 0.01, 0.1" in out
    assert "prox seed 2 lr 0.5: fedclip run" in out
    assert "8 runs of 2 arms" in out
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "takes one grid"),
        (["strategies", "--grid", "a.yaml"], "takes one grid"),
        (["nothing"], "no grid configs/bench/nothing.yaml"),
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
                             tuning={"seed": 9, "rates": [0.01]}))  # fmt: skip


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
    assert row["rounds"] == 1
    # Finished runs are read, not run again.
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.json*")}
    assert command.bench(tmp_path / "mine.yaml", tmp_path / "work", jobs=2) == 0
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.json*")} == before


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    plan = small(tmp_path)
    [cell] = plan.cells("plain", 0.01)
    (tmp_path / "runs" / cell.name).write_text("in the way")
    outcome = ProcessRunner(plan.config, tmp_path / "runs")(cell)
    assert isinstance(outcome, Failed)
    assert "is a file; choose another --output" in outcome.reason
    assert not outcome.diverged
