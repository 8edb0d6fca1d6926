"""Claims on pages are held to their figures, and stale figures are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.claims import fault, ratio_interval, stale_results, uncovered
from benchmarks.cleared import run_again
from benchmarks.sentences import comparative
from fedclip.experiment.bench.digest import ROOMS, code_digests, input_digests
from fedclip.experiment.bench.plan import Cell, make_plan
from fedclip.experiment.bench.runner import Finished


def arm(mean: float, half: float, rounds: tuple[int, ...] = (), **more: Any) -> dict[str, Any]:
    minus = {"mean": mean, "corrected_low": mean - half, "corrected_high": mean + half, **more}
    runs = [{"seed": seed, "rounds_to_95": value} for seed, value in enumerate(rounds)]
    return {"minus": {"full": minus}, "runs": runs}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    arms = {
        "full": arm(0.0, 0.0, (4, 5, 4, 5, 4)),
        "above": arm(0.03, 0.01, (2, 2, 2, 3, 2)),
        "near": arm(0.002, 0.004, (4, 5, 5, 4, 4)),
        "edge": arm(0.5, 0.01, excluded="the best lr of edge is the last one tried"),
    }
    figures = {"share_low": 0.96, "share_high": 0.99}
    details = {"arms": arms, "seconds": {"ours": [1.0, 1.1, 0.9], "theirs": [2.0, 2.2, 2.1]}}
    (tmp_path / "grid.json").write_text(json.dumps({"figures": figures, "details": details}))
    return tmp_path


@pytest.mark.parametrize(
    ("row", "held"),
    [
        ({"arm": "above", "sign": "better"}, True),
        ({"arm": "above", "sign": "worse"}, False),
        ({"arm": "near", "sign": "better"}, False),
        ({"arm": "near", "sign": "equal", "margin": 0.01}, True),
        ({"arm": "near", "sign": "equal", "margin": 0.005}, False),
        ({"arm": "above", "sign": "equal", "margin": 0.01}, False),
        ({"arm": "edge", "sign": "better"}, False),
        ({"arm": "above", "sign": "fewer", "metric": "rounds_to_95"}, True),
        ({"arm": "near", "sign": "fewer", "metric": "rounds_to_95"}, False),
        ({"figure": "share", "above": 0.95, "below": 1.0}, True),
        ({"figure": "share", "above": 0.97}, False),
        ({"ratio": ["details.seconds.theirs", "details.seconds.ours"], "above": 1.5}, True),
        ({"ratio": ["details.seconds.theirs", "details.seconds.ours"], "above": 2.0}, False),
        ({"ratio": ["details.seconds.ours", "details.seconds.theirs"], "below": 0.7}, True),
    ],
)
def test_a_claim_holds_where_its_interval_bears_it(
    results: Path, row: dict[str, Any], held: bool
) -> None:
    claim = {"file": "grid.json", "reference": "full", **row}
    assert (fault(claim, 0.05, results) is None) == held


def test_the_interval_of_a_ratio_is_welchs_on_logarithms() -> None:
    ours, theirs = [2.0, 2.2, 2.1, 2.3], [1.0, 1.1, 0.9]
    found = stats.ttest_ind(np.log(ours), np.log(theirs), equal_var=False)
    expected = np.exp(list(found.confidence_interval(0.99)))
    assert ratio_interval(ours, theirs, 0.01) == pytest.approx(expected)


def test_one_repeat_bears_no_claim() -> None:
    with pytest.raises(ValueError, match="two repeats"):
        ratio_interval([2.0], [1.0, 1.1], 0.05)


def test_comparative_sentences_are_found() -> None:
    text = (
        "# More of it\n\nIt is faster than that. It is blue.\n\n- one gains\n- two stays\n\n"
        "```bash\nbetter\n```\n\n`more` is a word of code. At more than 200 it stops, with 64 or "
        "more too.\n\n<!-- x-table -->\n| worse |\n<!-- /x-table -->\n\n| a row | loses |\n\n"
        "甲优于乙。丙是丁。"
    )
    found = ["It is faster than that.", "- one gains", "| a row | loses |", "甲优于乙。"]
    assert list(comparative(text)) == found


def test_every_sentence_needs_a_row_and_every_row_a_sentence() -> None:
    claims = {
        "claims": [{"says": "is faster", "pages": ["a.md"]}, {"says": "gone", "pages": ["a.md"]}],
        "no claim": {"b.md": ["gains nothing", "was better"]},
    }
    texts = {"a.md": "This is faster. That is slower.", "b.md": "One gains nothing."}
    assert uncovered(claims, texts) == (
        ["a.md: That is slower."],
        ["a.md: gone", "b.md: was better"],
    )


def test_digests_follow_statements_and_nothing_else(tmp_path: Path) -> None:
    for room in ROOMS:
        file = tmp_path / room if room.endswith(".py") else tmp_path / room / "a.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text('"""One."""\n\n\ndef f(x):\n    """Two."""\n    return x + 1  # three\n')
    before = code_digests(tmp_path)
    (tmp_path / "data" / "a.py").write_text("def f(x):\n    'Other.'\n    return (x +\n  1)\n")
    code_digests.cache_clear()
    assert code_digests(tmp_path) == before
    (tmp_path / "lora" / "a.py").write_text("def f(x):\n    return x + 2\n")
    code_digests.cache_clear()
    changed = [room for room, digest in code_digests(tmp_path).items() if digest != before[room]]
    assert "lora" in changed
    assert "federated" not in changed


def test_stale_results_are_named_with_what_changed(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text("a: 1  # a remark\n")
    inputs = input_digests([grid], tmp_path)
    grid.write_text("a: 1\n")
    assert input_digests([grid], tmp_path) == inputs
    folder = tmp_path / "results"
    folder.mkdir()

    def write(name: str, **keys: Any) -> None:
        (folder / name).write_text(json.dumps({"details": {"inputs": inputs}, **keys}))

    write("old.json")
    write("now.json", code=code_digests())
    write("then.json", code=code_digests() | {"lora": "another"})
    assert stale_results(folder, tmp_path) == [
        "old.json: measured before results carried digests",
        "then.json: changed since: lora",
    ]
    grid.write_text("a: 2\n")
    assert "now.json: changed since: grid.yaml" in stale_results(folder, tmp_path)


def test_a_result_is_cleared_by_cells_that_give_the_same(tmp_path: Path) -> None:
    text = "config: base.yaml\nseeds: [0, 1]\ntune: {client.learning_rate: [0.1]}\narms: {a: {}}\n"
    (tmp_path / "grid.yaml").write_text(text)
    (tmp_path / "base.yaml").write_text("data: {name: digits}\n")
    plan = make_plan(tmp_path / "grid.yaml")
    runs = [{"seed": 0, "accuracy": 0.8}, {"seed": 1, "accuracy": 0.9}]
    tuning = {"client.learning_rate": {"value": 0.1}}
    arms = {"a": {"runs": runs, "tuning": tuning, "accuracy": {"ci95": 0.02}}}

    def run(cell: Cell) -> Finished:
        assert "client.learning_rate=0.1" in cell.overrides
        return Finished(cell, {"accuracy": 0.8 + 0.11 * cell.seed})

    assert run_again(plan, arms, ["a:1", "a:0"], run) == [
        {"cell": "a:1", "then": 0.9, "now": pytest.approx(0.91), "allowed": 0.02},
        {"cell": "a:0", "then": 0.8, "now": 0.8, "allowed": 0.02},
    ]
    results = tmp_path / "results"
    results.mkdir()
    changed = code_digests() | {"lora": "another"}
    file = results / "x.json"
    file.write_text(json.dumps({"details": {}, "code": changed}))
    assert stale_results(results, tmp_path) == ["x.json: changed since: lora"]
    file.write_text(
        json.dumps({"details": {}, "code": changed, "cleared": {"code": code_digests()}})
    )
    assert stale_results(results, tmp_path) == []
