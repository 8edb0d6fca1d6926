"""Evaluation in detail: figures worked out by hand, and those of whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedclip as package
from fedclip.adapters import inspect as inspection
from fedclip.evaluation.breakdown import class_rows, confusion, in_detail
from fedclip.evaluation.metrics import calibration_error, macro_f1, reliability
from fedclip.reports.breakdown_plots import plots
from tests.conftest import Command
from tests.support.evaluation import made
from tests.support.runs import with_

PNG = b"\x89PNG\r\n\x1a\n"


SIX = made([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 2], [0.9, 0.8, 0.7, 0.6, 0.9, 1.0])
BASE = made([0, 0, 0, 1, 1, 2], [1, 0, 1, 1, 1, 1])


def test_confusion_and_macro_f1_by_hand() -> None:
    assert confusion(SIX, 4) == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    # F1 of the classes: 2/3, 1/2 and 1; the fourth occurs nowhere.
    assert macro_f1(SIX) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)


def test_classes_before_and_after_by_hand() -> None:
    rows = class_rows(SIX, BASE, ["a", "b", "c", "d"])
    assert [row["class"] for row in rows] == ["a", "b", "c", "d"]
    assert [row["examples"] for row in rows] == [3, 2, 1, 0]
    assert [row["recall"] for row in rows] == [pytest.approx(2 / 3), 0.5, 1, None]
    assert [row["base_recall"] for row in rows] == [pytest.approx(1 / 3), 1, 0, None]
    assert [row["change"] for row in rows] == [pytest.approx(1 / 3), -0.5, 1, None]
    assert [row["precision"] for row in rows] == [pytest.approx(2 / 3), 0.5, 1, None]
    assert [row["f1"] for row in rows] == [pytest.approx(2 / 3), 0.5, 1, None]


def test_a_class_that_is_never_found() -> None:
    (_, row) = class_rows(made([0, 1], [0, 0]), made([0, 1], [1, 0]), ["a", "b"])
    assert (row["recall"], row["precision"], row["f1"]) == (0, None, 0)


def test_calibration_by_hand() -> None:
    # Two bins: (0, 0.5] with 0.4 and 0.5, one of two correct; (0.5, 1] with 0.6 and 0.8, both.
    found = made([0, 0, 0, 0], [0, 1, 0, 0], [0.4, 0.5, 0.6, 0.8])
    low, high = reliability(found, bins=2)
    assert low == {
        "from": 0.0, "to": 0.5, "examples": 2, "accuracy": 0.5, "confidence": pytest.approx(0.45),
    }  # fmt: skip
    assert (high["examples"], high["accuracy"]) == (2, 1)
    # |0.5 - 0.45| / 2 + |1 - 0.7| / 2
    assert calibration_error(found, bins=2) == pytest.approx(0.175)


@given(st.lists(st.tuples(st.booleans(), st.floats(0.001, 1)), min_size=1, max_size=60))
def test_calibration_as_its_formula_reads(examples: list[tuple[bool, float]]) -> None:
    found = made(
        [0] * len(examples), [int(not hit) for hit, _ in examples], [c for _, c in examples]
    )
    total = 0.0
    for m in range(1, 16):
        inside = [(hit, c) for hit, c in examples if (m - 1) / 15 < c <= m / 15]
        total += abs(sum(hit - c for hit, c in inside)) / len(examples)
    assert calibration_error(found) == pytest.approx(total, abs=1e-9)
    assert sum(row["examples"] for row in reliability(found)) == len(examples)


@pytest.mark.usefixtures("pixels")
def test_no_examples_give_no_figures() -> None:
    none = made([], [])
    detail = in_detail(none, none, {"site": (none, none)}, ["a"])
    assert detail["trained"] == {"accuracy": None, "macro_f1": None, "calibration_error": None}
    assert detail["classes"][0]["recall"] is None
    assert detail["sites"][0]["accuracy"] is None
    assert all(data.startswith(PNG) for data in plots(detail).values())


@pytest.mark.usefixtures("pixels")
def test_plots_take_many_classes_and_odd_names() -> None:
    many = [f"$x_{number}" for number in range(70)]
    for names in (["a$b$c", "d", "e"], many):
        detail = in_detail(SIX, BASE, {}, names)
        found = plots(detail)
        assert sorted(found) == ["classes.png", "confusion.png", "reliability.png"]
        assert all(data.startswith(PNG) for data in found.values())


def test_details_of_a_run_agree_with_its_figures(finished_run: Path) -> None:
    figures = inspection.evaluate(finished_run, detail=True)
    detail = figures["detail"]
    assert detail["examples"] == figures["test_examples"]
    assert detail["trained"]["accuracy"] == pytest.approx(figures["accuracy"])
    assert detail["base"]["accuracy"] == pytest.approx(figures["zero_shot_accuracy"])
    assert {row["client_id"]: row["accuracy"] for row in detail["sites"]} == pytest.approx(
        figures["accuracy_by_client"]
    )
    assert sum(row["examples"] for row in detail["classes"]) == detail["examples"]
    for name in ("trained", "base"):
        matrix = np.array(detail["confusion"][name])
        assert matrix.sum() == detail["examples"]
        assert np.trace(matrix) / matrix.sum() == pytest.approx(detail[name]["accuracy"])
    assert {key: value for key, value in figures.items() if key != "detail"} == (
        inspection.evaluate(finished_run)
    )


def test_clients_models_are_judged_on_their_own_examples(tmp_path: Path) -> None:
    config = with_(federation={"rounds": 1, "strategy": "fedsa"}) | {"evaluation": {}}
    run = package.run(config, output=tmp_path / "run")
    figures = inspection.evaluate(run.folder, detail=True)
    detail = figures["detail"]
    assert (
        detail["examples"]
        == figures["test_examples"]
        == sum(r["examples"] for r in detail["sites"])
    )
    assert detail["trained"]["accuracy"] == pytest.approx(figures["accuracy"])
    assert {row["client_id"]: row["accuracy"] for row in detail["sites"]} == pytest.approx(
        figures["accuracy_by_client"]
    )


@pytest.mark.usefixtures("pixels")
def test_the_command_shows_tables_and_writes_plots(
    fedclip: Command, finished_run: Path, tmp_path: Path
) -> None:
    code, out, _ = fedclip("evaluate", finished_run, "--plots", tmp_path / "new" / "plots")
    assert code == 0
    assert "trained: macro f1" in out
    assert "base recall" in out
    assert "client id" in out
    assert sorted(path.name for path in (tmp_path / "new" / "plots").iterdir()) == [
        "classes.png",
        "confusion.png",
        "reliability.png",
    ]
    plain = json.loads(fedclip("evaluate", finished_run, "--json")[1])
    full = json.loads(fedclip("evaluate", finished_run, "--json", "--full")[1])
    assert "detail" not in plain
    assert len(full["detail"]["classes"]) == 10
    (tmp_path / "file").write_text("")
    code, _, err = fedclip("evaluate", finished_run, "--plots", tmp_path / "file")
    assert code == 2
    assert "--plots" in err


def test_evaluate_has_figures_by_class_and_info_fits_on_a_screen(
    fedclip: Command, finished_run: Path
) -> None:
    found = json.loads(fedclip("evaluate", finished_run, "--json")[1])
    rows, right = found["classes"], 0.0
    assert len(rows) == 10
    right = sum(row["examples"] * (row["recall"] or 0) for row in rows)
    assert right == pytest.approx(found["accuracy"] * found["test_examples"])
    _, out, _ = fedclip("evaluate", finished_run)
    assert [line.split()[0] for line in out.splitlines()[-10:]] == [row["class"] for row in rows]
    _, out, _ = fedclip("info", finished_run)
    assert len(out.splitlines()) < 32
    assert "sha256" not in out
    assert "accuracy" in out
