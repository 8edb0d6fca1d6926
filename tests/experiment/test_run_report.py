"""`report.html` of whole runs: finished, private, old, damaged, and what stays out of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import fedclip
from fedclip.errors import UsageError
from fedclip.experiment.folder import RunFolder
from fedclip.experiment.predictions_file import SAMPLES, read_predictions
from fedclip.experiment.report import read_run, report
from fedclip.reports.listener import Listener
from tests.conftest import Command
from tests.support.runs import with_

OLD = Path(__file__).parents[1] / "support" / "files" / "run_b6f3d3e"


def test_every_run_folder_has_a_page(finished_run: Path) -> None:
    text = (finished_run / "report.html").read_text(encoding="utf-8")
    assert "Confusion matrix" in text
    assert "data:image/png;base64," in text
    run = read_run(finished_run)
    # The matrix is that of the test set, whose accuracy stands in the summary.
    tested = run.tested[""]
    right = sum(n for true, predicted, n in tested.confusion if true == predicted)
    every = sum(n for _, _, n in tested.confusion)
    assert run.summary is not None
    assert right / every == pytest.approx(run.summary.accuracy)
    of_right = [s.label == s.predicted for s in tested.samples]
    assert sum(of_right) <= SAMPLES
    assert len(of_right) - sum(of_right) <= SAMPLES
    assert {layer.rank for layer in run.layers} == {2}


def test_matrices_are_those_of_other_ways_to_the_same_predictions(finished_run: Path) -> None:
    figures = fedclip.evaluate(finished_run, detail=True)
    matrix = figures["detail"]["confusion"]["trained"]
    found = {(i, j): n for i, row in enumerate(matrix) for j, n in enumerate(row) if n}
    kept = read_run(finished_run).tested[""].confusion
    assert {(i, j): n for i, j, n in kept} == found


class KillBeforeTheEnd(Listener):
    """Stops a run after its last round, before anything else is written."""

    def round(self, record: object) -> None:
        if record["server_round"] == 1:  # type: ignore[index]
            raise KeyboardInterrupt


def test_a_run_resumed_after_its_last_round_has_the_same_predictions(tmp_path: Path) -> None:
    config = with_(federation={"rounds": 1}, evaluation={"keep_best": False})
    whole = fedclip.run(config, output=tmp_path / "whole").folder
    with pytest.raises(KeyboardInterrupt):
        fedclip.run(config, output=tmp_path / "cut", listener=KillBeforeTheEnd())
    cut = fedclip.resume(tmp_path / "cut").folder
    assert (cut / "predictions.json").read_bytes() == (whole / "predictions.json").read_bytes()


def test_personal_models_are_judged_each_on_its_own(tmp_path: Path) -> None:
    config = with_(federation={"rounds": 1, "strategy": "local"}, evaluation={"keep_best": False})
    run = fedclip.run(config, output=tmp_path / "run")
    tested = read_run(run.folder).tested[""].confusion
    right = sum(n for true, predicted, n in tested if true == predicted)
    assert right / sum(n for *_, n in tested) == pytest.approx(run.summary["accuracy"])


@pytest.mark.filterwarnings("ignore:privacy.unit")
def test_a_private_run_shows_nothing_of_sites(tmp_path: Path) -> None:
    privacy = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3, "tell": True}
    config = with_(federation={"rounds": 1}, evaluation={"keep_best": False}, privacy=privacy)
    folder = fedclip.run(config, output=tmp_path / "run").folder
    assert not (folder / "predictions.json").exists()
    told = json.loads((folder / "told.jsonl").read_text().splitlines()[1])
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "Epsilon spent by round" in text
    for site in told["accuracy_by_client"]:
        assert site not in text
    assert "Confusion matrix" not in text
    assert "data:image/" not in text
    # Nor does a file that somebody puts there, or the partition of the data.
    (folder / "predictions.json").write_text('{"": {"class_names": ["a"], "confusion": []}}')
    run = read_run(folder)
    assert (run.tested, run.partitions) == ({}, {})


def test_old_runs_and_runs_without_some_files(tmp_path: Path) -> None:
    old = shutil.copytree(OLD, tmp_path / "old")
    assert "kept no predictions" in report([old]).read_text(encoding="utf-8")
    for name in ("partition.json", "timing.jsonl", "summary.json"):
        (old / name).unlink()
        shutil.rmtree(old / "adapter", ignore_errors=True)
        assert "so far" in report([old]).read_text(encoding="utf-8") or name != "summary.json"


def test_damaged_files_are_named(tmp_path: Path, finished_run: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "predictions.json").write_text('{"": {"class_names": ["a"], "confusion": [[0, 3, 1]]}}')
    with pytest.raises(UsageError, match=r"predictions\.json is damaged"):
        report([run])
    (run / "predictions.json").unlink()
    (run / "timing.jsonl").write_text('{"server_round": 0, "seconds": "many"}\n')
    with pytest.raises(UsageError, match=r"timing\.jsonl is damaged: seconds"):
        report([run])


def test_command(fedclip: Command, tmp_path: Path, finished_run: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "report.html").unlink()
    code, out, _ = fedclip("report", run, "--no-images")
    assert (code, out.strip()) == (0, str(run / "report.html"))
    assert "data:image/" not in (run / "report.html").read_text(encoding="utf-8")
    code, _, err = fedclip("report", run, run)
    assert code == 2
    assert "--output" in err
    code, out, _ = fedclip("report", run, run, "-o", tmp_path / "two.html")
    assert code == 0
    assert "side by side" in (tmp_path / "two.html").read_text(encoding="utf-8")
    assert fedclip("report", tmp_path)[0] == 2
    assert fedclip("report", run, "-o", tmp_path / "no" / "such.html")[0] == 2


def test_a_report_that_fails_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedclip.experiment.report.run_page", lambda run: 1 / 0)
    with pytest.warns(fedclip.errors.FedclipWarning, match=r"report\.html could not be written"):
        run = fedclip.run(with_(federation={"rounds": 1}), output=tmp_path / "run")
    assert run.summary["rounds"] == 1


def test_samples_are_the_surest_mistakes_and_one_of_each_class_first() -> None:
    from fedclip.experiment.predictions_file import _samples

    labels = np.array([0, 0, 0, 1, 1, 2] * 5)
    predicted = labels.copy()
    predicted[[4, 10]] = 0
    confidence = np.linspace(0.1, 0.9, 30)
    found = list(_samples(labels, predicted, confidence))
    assert found[:2] == [10, 4]
    assert labels[found[2:5]].tolist() == [0, 1, 2]
    assert len(found) == 2 + SAMPLES
    assert read_predictions(RunFolder("/nowhere")) == {}
