"""What accuracy alone hides: majority-class rate, macro-F1, and the worst class with its recall."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedclip as package
from fedclip.adapters import inspect as inspection
from fedclip.adapters.card import run_card
from fedclip.errors import UsageError
from fedclip.evaluation import metrics
from fedclip.evaluation.metrics import METRICS, chosen, class_figures
from fedclip.evaluation.per_client import figures, together, told_by_clients
from fedclip.reports.closing import closing_lines, evaluation_facts
from fedclip.reports.share import wilson
from tests.conftest import Command
from tests.support.evaluation import made
from tests.support.runs import with_

NAMES = ("plain", "striped", "marked")


def test_by_hand() -> None:
    # recall 2/3, 1, 0; precision 2/3, 2/3, -; F1 2/3, 4/5, 0
    found = class_figures(made([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 0]), NAMES)
    assert found == {
        "majority_class_rate": 0.5,
        "macro_f1": pytest.approx((2 / 3 + 4 / 5) / 3),
        "worst_class": {"name": "marked", "recall": 0.0},
    }


def test_a_class_without_a_test_image_is_not_the_worst() -> None:
    found = class_figures(made([0, 0, 1], [0, 2, 1]), NAMES)
    assert found["worst_class"] == {"name": "plain", "recall": 0.5}
    # predicted all the same, so that its F1 of 0 counts: 2/3, 1, 0
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert set(class_figures(made([], []), NAMES).values()) == {None}


def test_of_several_tasks() -> None:
    cloth, steel = made([0, 0, 2, 2], [0, 0, 2, 0]), made([0, 0, 0, 1], [0, 1, 0, 1])
    basic = {name: METRICS[name] for name in ("accuracy", "loss")}
    tasks = {
        task: figures(own, own, {}, basic) | class_figures(own, NAMES)
        for task, own in (("cloth", cloth), ("steel", steel))
    }
    found = together(tasks)
    assert found["majority_class_rate"] == (0.5 + 0.75) / 2
    assert found["macro_f1"] == pytest.approx(((4 / 5 + 2 / 3) / 2 + (4 / 5 + 2 / 3) / 2) / 2)
    assert found["worst_class"] == {"name": "cloth: marked", "recall": 0.5}
    assert found["worst_class_by_task"]["steel"] == {"name": "plain", "recall": 2 / 3}
    tasks["steel"] |= class_figures(made([], []), NAMES)
    assert together(tasks)["macro_f1"] is together(tasks)["worst_class"] is None


def test_sites_that_tell_counts_alone_leave_them_unknown() -> None:
    told = told_by_clients({"a": (4, 3)}, ["a"], personal=True)
    assert told["macro_f1"] is told["worst_class"] is told["majority_class_rate"] is None
    assert "macro_f1" not in told_by_clients({}, ["a"], personal=False)


def test_only_the_built_in_metric_may_have_such_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(chosen(["majority_class_rate", "macro_f1"])) == ["majority_class_rate", "macro_f1"]
    monkeypatch.setattr(metrics, "METRICS", {})
    with pytest.raises(UsageError, match="taken"):
        chosen(["macro_f1"])
    for name in ("file.py:macro_f1", "file.py:worst_class", "file.py:input_size"):
        with pytest.raises(UsageError, match="taken"):
            chosen([name])


@pytest.fixture(scope="module")
def personal_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = with_(federation={"rounds": 1, "strategy": "fedsa"}, evaluation={"keep_best": False})
    return package.run(config, output=tmp_path_factory.mktemp("personal") / "run").folder


@pytest.mark.parametrize("of", ["finished_run", "personal_run"])
def test_a_run_ends_with_them(of: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(of)
    summary = json.loads((run / "summary.json").read_text())
    again = inspection.evaluate(run, detail=True)
    detail = again["detail"]
    recalls = {row["class"]: row["recall"] for row in detail["classes"] if row["examples"]}
    before = {row["class"]: row["base_recall"] for row in detail["classes"] if row["examples"]}
    examples = [row["examples"] for row in detail["classes"]]
    assert summary["majority_class_rate"] == max(examples) / sum(examples)
    assert summary["macro_f1"] == pytest.approx(detail["trained"]["macro_f1"])
    assert summary["zero_shot_macro_f1"] == pytest.approx(detail["base"]["macro_f1"])
    for key, known in (("worst_class", recalls), ("zero_shot_worst_class", before)):
        worst = summary[key]
        assert worst["recall"] == min(known.values()) == known[worst["name"]]
        assert again[key] == worst


def test_they_stand_in_the_last_lines_and_the_card(fedclip: Command, finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    _, out, _ = fedclip("run", "--resume", finished_run)
    *lines, accuracy, few, folder = out.splitlines()
    assert folder == f"run folder: {finished_run}"
    images = summary["test_examples"]
    assert accuracy.startswith(f"accuracy {summary['accuracy']:.3f} on {images} test images (95 % ")
    assert few.startswith(f"{images} test images are little to go by")
    worst, before = summary["worst_class"], summary["zero_shot_worst_class"]
    told = json.loads((finished_run / "metrics.jsonl").read_text().splitlines()[-1])
    site = summary["worst_site"]
    assert site["accuracy"] == min(told["accuracy_by_client"].values())
    assert told["accuracy_by_client"][site["name"]] == site["accuracy"]
    assert lines[3] == f"worst site: {site['name']}, accuracy {site['accuracy']:.3f}"
    assert lines[:3] == [
        f"majority-class rate {summary['majority_class_rate']:.3f}: the accuracy of always "
        "answering the most frequent class",
        f"macro-F1 {summary['macro_f1']:.3f} (zero-shot {summary['zero_shot_macro_f1']:.3f})",
        f"worst class: {worst['name']}, recall {worst['recall']:.3f} "
        f"(zero-shot: {before['name']}, recall {before['recall']:.3f})",
    ]
    _, out, _ = fedclip("evaluate", finished_run)
    low, high = wilson(summary["accuracy"], images)
    assert "accuracy: 95 % interval" in out
    assert f"{low:.3f} to {high:.3f}" in out
    assert f"{low:.3f} to {high:.3f}" in accuracy
    card = run_card(finished_run)
    assert f"| majority-class rate | {summary['majority_class_rate']:.3f} |" in card
    assert f"after: {worst['name']}, recall {worst['recall']:.3f} |" in card


def test_a_name_takes_one_line_and_an_older_run_has_none() -> None:
    summary = {"accuracy": 0.5, "zero_shot_accuracy": 0.25, "rounds": 2, "best": None}
    assert closing_lines(summary) == ["accuracy 0.500 (zero-shot 0.250) after 2 rounds"]
    chosen_then = {"metrics": ["macro_f1"], "macro_f1": 0.5, "initial_macro_f1": 0.25}
    assert closing_lines(summary | chosen_then)[:-1] == ["macro_f1 0.500 (0.250 before)"]
    worst = {"name": "a\nrun folder: /", "recall": 0.0}
    found = {"majority_class_rate": 0.5, "macro_f1": 0.5, "worst_class": worst}
    assert all("\n" not in line for line in closing_lines(summary | found))


def test_where_all_are_alike_none_is_the_worst() -> None:
    summary = {
        "accuracy": 1.0, "zero_shot_accuracy": 0.5, "rounds": 10, "test_examples": 43,
        "majority_class_rate": 0.5, "macro_f1": 1.0, "zero_shot_macro_f1": 0.4,
        "worst_class": {"name": "boots", "recall": 1.0},
        "zero_shot_worst_class": {"name": "boots", "recall": 0.25},
        "client_accuracy": {"mean": 1.0, "min": 1.0, "max": 1.0},
        "worst_site": {"name": "client-00", "accuracy": 1.0},
    }  # fmt: skip
    assert closing_lines(summary)[2:] == [
        "worst class: none, all have recall 1.000 (zero-shot: boots, recall 0.250)",
        "worst site: none, all have accuracy 1.000",
        "accuracy 1.000 on 43 test images (95 % interval 0.918 to 1.000; zero-shot 0.500) "
        "after 10 rounds",
        "43 test images are little to go by: each one moves the accuracy by 0.023",
    ]
    less = summary | {"accuracy": 0.9, "client_accuracy": {"mean": 1.1, "min": 1.0, "max": 1.2}}
    assert "worst site: client-00, accuracy 1.000" in closing_lines(less)
    several = summary | {"tasks": {"a": {}, "b": {}}}  # a mean over tasks has no such interval
    assert "accuracy 1.000 on 43 test images (zero-shot 0.500) after 10 rounds" in closing_lines(
        several
    )


def test_an_evaluation_in_words() -> None:
    by_task = {"a": {"name": "x", "recall": 0.5}, "b": {"name": "y", "recall": 1.0}}
    told = evaluation_facts(
        {"accuracy": 1.0, "worst_class": by_task["a"], "test_examples": 200,
         "worst_class_by_task": by_task, "accuracy_by_task": {"a": 0.75, "b": 1.0}}
    )  # fmt: skip
    assert told == {
        "accuracy": "1.000",
        "worst_class": "x, recall 0.500",
        "test_examples": 200,
        "worst_class_by_task": {"a": "x, recall 0.500", "b": "none, all have recall 1.000"},
        "accuracy_by_task": {"a": "0.750", "b": "1.000"},
    }
