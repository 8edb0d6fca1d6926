"""Whole runs on random weights: what they leave behind, and that no kill changes it."""

import json
import random
import shutil
from dataclasses import replace

import pytest

import fedclip
from fedclip.adapters.inspect import evaluate, info
from fedclip.errors import FedclipError, TrainingFailed, UsageError
from fedclip.experiment import engine
from fedclip.experiment import run as experiment
from fedclip.experiment.folder import RunFolder
from tests.support.runs import CONFIG, StopAfter, contents, with_


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing disturbed."""
    return fedclip.run(CONFIG, output=tmp_path_factory.mktemp("undisturbed") / "run")


def test_a_run_folder_holds_what_the_documentation_lists(undisturbed):
    names = {path.name for path in undisturbed.folder.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.yaml",
        "partition.json",
        "metrics.jsonl",
        "timing.jsonl",
        "summary.json",
        "curves.png",
        "predictions.json",
        "report.html",
        "checkpoint.safetensors",
        "checkpoint_previous.safetensors",
        "adapter",
        "adapter_best",
    }
    summary = json.loads((undisturbed.folder / "summary.json").read_text())
    assert summary == undisturbed.summary
    records = RunFolder(undisturbed.folder).read_metrics()
    assert [r["server_round"] for r in records] == [0, 1, 2, 3]
    assert summary["accuracy"] == records[-1]["accuracy"]
    assert summary["zero_shot_accuracy"] == records[0]["accuracy"]
    # r * (in + out) of 4 projections in 4 layers of width 32
    assert summary["trainable_parameters"] == 2 * (32 + 32) * 4 * 4
    assert summary["bytes_up_per_client_round"] == 4 * summary["trainable_parameters"]
    assert set(summary["client_accuracy"]) == {"mean", "min", "max"}
    assert all(len(r["clients"]) == 2 for r in records[1:])
    timing = RunFolder(undisturbed.folder).read_timing()
    assert sum(t["seconds"] for t in timing) <= summary["seconds"]


def test_the_best_adapter_is_the_best_by_validation(undisturbed):
    records = RunFolder(undisturbed.folder).read_metrics()[1:]
    best = max(records, key=lambda r: (r["validation_accuracy"], -r["server_round"]))
    assert undisturbed.summary["best"] == {
        "server_round": best["server_round"],
        "validation_accuracy": best["validation_accuracy"],
        "accuracy": best["accuracy"],
    }


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(undisturbed, tmp_path):
    again = fedclip.run(CONFIG, output=tmp_path / "again")
    assert contents(again.folder) == contents(undisturbed.folder)
    other = fedclip.run(with_() | {"seed": 1}, output=tmp_path / "other")
    assert other.summary["adapter_sha256"] != again.summary["adapter_sha256"]


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_an_interrupted_run_goes_on_to_the_same_bytes(undisturbed, tmp_path, stop):
    with pytest.raises(KeyboardInterrupt):
        experiment.run(CONFIG, output=tmp_path / "run", listener=StopAfter(stop))
    resumed = experiment.resume(tmp_path / "run")
    assert contents(resumed.folder) == contents(undisturbed.folder)
    assert resumed.summary["adapter_sha256"] == undisturbed.summary["adapter_sha256"]


def test_a_run_that_only_has_its_configuration_starts_at_the_first_round(undisturbed, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_bytes((undisturbed.folder / "config.yaml").read_bytes())
    assert contents(experiment.resume(folder).folder) == contents(undisturbed.folder)


def test_resuming_a_finished_run_changes_nothing(undisturbed):
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in undisturbed.folder.glob("*.*")}
    assert experiment.resume(undisturbed.folder).summary == undisturbed.summary
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in undisturbed.folder.glob("*.*")}
    assert before == after


def test_a_new_run_never_overwrites_an_old_one(undisturbed):
    before = contents(undisturbed.folder)
    with pytest.raises(UsageError, match=r"already holds a run.*--resume"):
        fedclip.run(CONFIG, output=undisturbed.folder)
    assert contents(undisturbed.folder) == before


def test_a_resumed_run_notices_that_the_data_has_changed(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        experiment.run(CONFIG, output=folder, listener=StopAfter(1))
    record = json.loads((folder / "partition.json").read_text())
    record["fingerprint"] = "of other data"
    (folder / "partition.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"partition\.json.*changed"):
        experiment.resume(folder)


@pytest.mark.parametrize("rule", [None, 1, 3])
def test_a_run_whose_test_images_another_version_chose_is_refused(rule, tmp_path, finished_run):
    shutil.copytree(finished_run, tmp_path / "run")
    path = tmp_path / "run/partition.json"
    record = json.loads(path.read_text())
    assert record.pop("split") == 2
    path.write_text(json.dumps(record if rule is None else record | {"split": rule}))
    why = rf"another version of fedclip.*another rule \(split {rule or 1}, here 2\)"
    with pytest.raises(UsageError, match=why):
        evaluate(tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    with pytest.raises(UsageError, match=why):
        experiment.resume(tmp_path / "run")
    info(tmp_path / "run")


def test_a_failed_round_keeps_the_last_good_state(undisturbed, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        experiment.run(CONFIG, output=folder, listener=StopAfter(1))
    good = (folder / "checkpoint.safetensors").read_bytes()
    settings = engine.local_settings
    with monkeypatch.context() as patch:
        patch.setattr(
            engine,
            "local_settings",
            lambda *given: replace(settings(*given), learning_rate=1e30, batch_size=4),
        )
        with pytest.raises(TrainingFailed, match=r"client client-\d+, round 2: .*learning_rate"):
            experiment.resume(folder)
    assert (folder / "checkpoint.safetensors").read_bytes() == good
    assert contents(experiment.resume(folder).folder) == contents(undisturbed.folder)


def test_a_full_disk_keeps_the_last_good_state(undisturbed, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        experiment.run(CONFIG, output=folder, listener=StopAfter(1))
    good = (folder / "checkpoint.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fedclip.files.write_synced", full)
        with pytest.raises(FedclipError, match=r"No space left.*last good state is kept") as caught:
            experiment.resume(folder)
    assert caught.value.exit_code == 1
    assert (folder / "checkpoint.safetensors").read_bytes() == good
    assert contents(experiment.resume(folder).folder) == contents(undisturbed.folder)


def test_a_run_on_a_relative_folder_goes_on_from_elsewhere(tmp_path, monkeypatch):
    from PIL import Image

    rng = random.Random(0)
    for name in ("dark", "light"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            grey = rng.randrange(100) + 150 * (name == "light")
            Image.new("RGB", (20, 20), (grey, grey, grey)).save(
                tmp_path / "images" / name / f"{i}.{'png' if i % 2 else 'jpg'}"
            )
    config = with_(data={"name": "imagefolder", "path": "images", "max_train_examples": None})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(config, output="run", listener=StopAfter(1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert experiment.resume("../run").summary["rounds"] == 3
