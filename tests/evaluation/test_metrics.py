"""Metrics by name: by hand, against scikit-learn, and in every place of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.dummy import DummyClassifier

import fedclip as package
from fedclip.adapters import inspect as inspection
from fedclip.adapters.card import run_card
from fedclip.cli.runs import _conclude
from fedclip.config.loading import config_from_dict
from fedclip.errors import UsageError
from fedclip.evaluation import metrics
from fedclip.evaluation.metrics import METRICS, RESERVED, chosen, worst_class
from tests.support.evaluation import made
from tests.support.runs import with_

FOUND = made([0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 0, 1], losses=[1, 1, 1, 2, 0, 0, 2])


def test_by_hand() -> None:
    figures = {name: metric(FOUND) for name, metric in METRICS.items()}
    assert figures["accuracy"] == pytest.approx(4 / 7)
    assert figures["loss"] == 1
    assert figures["majority_class_rate"] == pytest.approx(4 / 7)
    assert figures["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    # precision 3/4, 1/3, -; recall 3/4, 1/2, 0
    assert figures["macro_f1"] == pytest.approx((3 / 4 + 2 / 5 + 0) / 3)
    # confidence 0.5 everywhere: one bin
    assert figures["calibration_error"] == pytest.approx(4 / 7 - 1 / 2)
    assert worst_class(FOUND) == (2, 0.0)
    assert worst_class(made([1, 0], [0, 1])) == (0, 0.0)
    assert worst_class(made([], [])) is None


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label")
def test_as_scikit_learn_has_them(pairs: list[tuple[int, int]]) -> None:
    labels, predicted = map(list, zip(*pairs, strict=True))
    found = made(labels, predicted)
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, predicted),
        "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(labels, predicted),
        "macro_f1": sklearn.metrics.f1_score(labels, predicted, average="macro", zero_division=0),
        "majority_class_rate": DummyClassifier(strategy="most_frequent")
        .fit(np.zeros((len(labels), 1)), labels)
        .score(np.zeros((len(labels), 1)), labels),
    }
    assert METRICS["macro_f1"](found) == expected["macro_f1"]  # to the bit
    assert {name: METRICS[name](found) for name in expected} == pytest.approx(expected)


def test_unknown_and_repeated_names_are_refused() -> None:
    assert list(chosen(["accuracy", "macro_f1", "loss"])) == ["macro_f1"]
    message = (
        r"evaluation\.metrics.* must be .*one of accuracy, .*'macro_f2'; did you mean macro_f1"
    )
    with pytest.raises(UsageError, match=message):
        chosen(["macro_f2"])
    with pytest.raises(UsageError, match=message):
        config_from_dict({"evaluation": {"metrics": ["macro_f2"]}})
    with pytest.raises(UsageError, match="taken"):
        chosen(["macro_f1", "macro_f1"])


@pytest.mark.parametrize(("value", "expected"), [(0.5, 0.5), (float("nan"), None), (None, None)])
def test_a_figure_is_a_finite_number_or_none(
    value: object, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "METRICS", {"mine": lambda found: value})
    assert chosen(["mine"])["mine"](FOUND) == expected


def test_a_metric_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "METRICS", {"mine": lambda found: "much"})
    with pytest.raises(UsageError, match=r"mine failed on 7 predictions: ValueError"):
        chosen(["mine"])["mine"](FOUND)


def test_a_chosen_metric_stands_in_every_place_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["macro_f1", "majority_class_rate"]
    run = package.run(
        with_(federation={"rounds": 1}, evaluation={"metrics": names}), output=tmp_path / "run"
    )
    first, last = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    for name in names:
        assert run.summary[name] == last[name] is not None
        assert run.summary[f"initial_{name}"] == first[name]
        assert first[f"zero_shot_{name}"] == first[name]
        assert run.summary[f"client_{name}"]["min"] == min(last[f"{name}_by_client"].values())
    again = inspection.evaluate(run.folder, detail=True)
    assert again["macro_f1"] == pytest.approx(last["macro_f1"])
    assert again["detail"]["trained"]["macro_f1"] == pytest.approx(last["macro_f1"])
    assert again["majority_class_rate"] == last["majority_class_rate"]
    figure = f"{last['macro_f1']:.3f}"
    assert f"| macro_f1 | {first['macro_f1']:.3f} before, {figure} after |" in run_card(run.folder)
    _conclude(run)
    assert f"macro_f1 {figure} (" in capsys.readouterr().out


def test_no_metric_can_take_a_key_of_a_run(finished_run: Path) -> None:
    record = {
        key
        for line in (finished_run / "metrics.jsonl").read_text().splitlines()
        for key in json.loads(line)
    }
    summary = json.loads((finished_run / "summary.json").read_text()).keys()
    assert record | summary <= RESERVED
