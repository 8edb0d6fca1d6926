"""Whole runs of several tasks: what they leave behind, in every way of sharing."""

import json

import pytest
import torch

import fedclip
from fedclip.adapters import inspect as inspection
from fedclip.adapters.export import export
from fedclip.config.loading import config_from_dict
from fedclip.errors import UsageError
from fedclip.experiment import run as experiment
from fedclip.experiment.build import with_absolute_paths
from fedclip.experiment.folder import RunFolder
from fedclip.models.adapter_updates import read_lora
from tests.support.runs import StopAfter
from tests.support.small import SMALL

NUMERI = ["zero", "uno", "due", "tre", "quattro", "cinque", "sei", "sette", "otto", "nove"]
TASKS = {
    "digits": {"num_clients": 2, "max_train_examples": 40},
    "numeri": {"class_names": NUMERI, "templates": ["il numero {}"], "max_train_examples": 60},
}


def config(mode="per_task", model_name=SMALL, **federation):
    return {
        "model": {"model_name": model_name, "lora": {"r": 4, "lora_dropout": 0.1}},
        "client": {"learning_rate": 0.01},
        "data": {"batch_size": 16, "partition": {"name": "iid"}},
        "tasks": TASKS,
        "federation": {"rounds": 2, "num_clients": 3, "sharing": {"mode": mode}} | federation,
        "evaluation": {"max_examples": 40},
    }


@pytest.fixture(scope="module")
def per_task(tmp_path_factory):
    return fedclip.run(
        config(model_name="random:tiny"), output=tmp_path_factory.mktemp("per_task") / "run"
    )


def names(path):
    return {p.name for p in path.iterdir()}


def test_every_task_ends_with_an_adapter_and_all_with_a_merged_one(per_task):
    summary, folder = per_task.summary, per_task.folder
    assert names(folder / "adapter_of") == {"digits", "numeri"}
    assert summary["clients"] == 5
    assert set(summary["tasks"]) == {"digits", "numeri"}
    assert summary["tasks"]["numeri"]["clients"] == 3
    matrix = summary["adapters"]
    assert list(matrix) == ["digits", "numeri", "merged"]
    assert all(set(row) == {"digits", "numeri"} for row in matrix.values())
    for task, figures in summary["tasks"].items():
        assert matrix[task][task] == figures["accuracy"]
    mean = sum(task["accuracy"] for task in summary["tasks"].values()) / 2
    assert summary["accuracy"] == pytest.approx(mean, abs=1e-12)
    assert summary["groups"]["digits"] == ["digits/client-00", "digits/client-01"]
    assert summary["bytes_up_per_client_round"] == 4 * summary["trainable_parameters"]
    merged = read_lora(folder / "adapter")
    assert merged.notes.class_names[9:12] == ("nine", "uno", "due")
    assert len(merged.notes.class_names) == 19  # zero is in both
    parts = [read_lora(folder / "adapter_of" / task) for task in ("digits", "numeri")]
    assert parts[0].notes.class_names[0] == "zero"
    # svd with weights 1/n: the mean of the updates, at the adapters' own rank
    for path, (a, b) in merged.layers.items():
        assert len(a) == 4
        mean = sum(p.layers[path].b @ p.layers[path].a for p in parts) / 2
        u, s, vh = torch.linalg.svd(mean)
        best = u[:, :4] * s[:4] @ vh[:4]
        torch.testing.assert_close(b @ a, best, rtol=1e-3, atol=1e-6)


def test_the_run_is_evaluated_again_to_the_same_figures(per_task):
    again = inspection.evaluate(per_task.folder)
    assert again["adapters"] == per_task.summary["adapters"]
    assert again["accuracy"] == per_task.summary["accuracy"]
    with pytest.raises(UsageError, match="several tasks; figures in detail"):
        inspection.evaluate(per_task.folder, detail=True)


def test_an_adapter_inside_the_run_is_used_by_its_path(per_task, tmp_path):
    model = inspection.load_run_model(per_task.folder / "adapter_of" / "digits")
    assert len(model.class_names) == 10
    assert len(inspection.load_run_model(per_task.folder).class_names) == 19
    found = export(per_task.folder / "adapter_of" / "digits", "merged", tmp_path / "plain")
    assert (tmp_path / "plain" / "config.json").is_file()
    assert found["to"] == "merged"


@pytest.mark.parametrize("mode", ["per_task", "clusters"])
def test_a_run_that_was_stopped_ends_in_the_same_bytes(mode, per_task, tmp_path):
    settings = config(mode)
    whole = fedclip.run(settings, output=tmp_path / "whole")
    for server_round in (0, 1):
        path = tmp_path / f"stopped-{server_round}"
        with pytest.raises(KeyboardInterrupt):
            fedclip.run(settings, output=path, listener=StopAfter(server_round))
        experiment.resume(path)
        for file in ("metrics.jsonl", "partition.json", "checkpoint.safetensors"):
            assert (path / file).read_bytes() == (whole.folder / file).read_bytes(), file
        for group in whole.summary["groups"]:
            part = f"adapter_of/{group}/adapter_model.safetensors"
            assert (path / part).read_bytes() == (whole.folder / part).read_bytes()
        ours = json.loads((path / "summary.json").read_text())
        assert ours["adapters"] == whole.summary["adapters"]
        assert ours["state_sha256"] == whole.summary["state_sha256"]


@pytest.mark.parametrize("mode", ["shared", "per_task", "shared+task", "clusters"])
def test_engines_agree(mode, tmp_path):
    runs = []
    for engine in ("batched", "sequential"):
        settings = config(mode) | {"engine": {"name": engine}}
        settings["client"] = {"learning_rate": 0.3}
        settings["optimizer"] = {"name": "sgd"}  # AdamW's first steps amplify rounding
        settings["model"] = {"model_name": SMALL, "lora": {"r": 4, "lora_dropout": 0.1}}
        settings["model"]["lora"]["target_modules"] = {
            "vision_encoder": ["q_proj"],
            "text_encoder": ["fc1"],
        }
        runs.append(fedclip.run(settings, output=tmp_path / engine))
    states = [RunFolder(run.folder).load_checkpoint()[0] for run in runs]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        error = (tensor - states[1][name]).norm() if tensor.numel() else torch.zeros(())
        assert error <= 1e-5 * tensor.norm(), name


def test_one_adapter_for_all_knows_the_classes_of_all(tmp_path):
    run = fedclip.run(config("shared"), output=tmp_path / "run")
    assert list(run.summary["adapters"]) == ["shared"]
    assert not (run.folder / "adapter_of").exists()
    assert "groups" not in run.summary
    notes = read_lora(run.folder / "adapter").notes
    assert notes.class_names[:2] == ("zero", "one")
    assert len(notes.class_names) == 19


def test_a_task_of_smaller_batches_takes_more_steps_and_is_not_left_out(tmp_path):
    values = config(rounds=1)
    values["tasks"] = {name: dict(own) for name, own in TASKS.items()}
    values["tasks"]["numeri"]["batch_size"] = 4
    run = fedclip.run(values, output=tmp_path / "run")
    (record,) = RunFolder(run.folder).read_metrics()[1:]
    assert "left_out" not in record
    assert len(record["clients"]) == 5
    assert record["clients"]["numeri/client-00"]["steps"] > 3


def test_strategies_that_change_frozen_weights_do_so_for_each_task(tmp_path):
    """FedEx's residuals of one task must not reach another, nor what is saved of it."""
    run = fedclip.run(config(strategy="fedex"), output=tmp_path / "run")
    matrix = run.summary["adapters"]
    for task in ("digits", "numeri"):
        adapter = run.folder / "adapter_of" / task
        assert read_lora(adapter).rank > 4  # the residual is in it
        assert matrix[task][task] == run.summary["tasks"][task]["accuracy"]
    again = inspection.evaluate(run.folder)
    assert again["adapters"] == matrix


def test_personal_factors_belong_to_a_site_and_task(tmp_path):
    run = fedclip.run(config("shared", strategy="fedsa"), output=tmp_path / "run")
    folders = names(run.folder / "adapter_of")
    assert folders == {f"digits%2Fclient-0{i}" for i in range(2)} | {
        f"numeri%2Fclient-0{i}" for i in range(3)
    }
    model = inspection.load_run_model(run.folder / "adapter_of" / "digits%2Fclient-00")
    assert len(model.class_names) == 10


def test_clusters_of_one_data_set(tmp_path):
    """Groups are found without tasks too; every client is judged by its own group's model."""
    settings = config("clusters", rounds=2)
    settings["federation"]["sharing"] |= {"clusters": 2}
    settings = {k: v for k, v in settings.items() if k != "tasks"}
    settings["data"] |= {"name": "digits", "max_train_examples": 60}
    run = fedclip.run(settings, output=tmp_path / "run")
    groups = run.summary["groups"]
    assert sorted(c for own in groups.values() for c in own) == [f"client-0{i}" for i in range(3)]
    assert names(run.folder / "adapter_of") == set(groups) == {"cluster-0", "cluster-1"}
    assert inspection.evaluate(run.folder)["accuracy"] == run.summary["accuracy"]


def test_folders_of_tasks_are_found_again_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images" / "a").mkdir(parents=True)
    settings = config() | {"tasks": {**TASKS, "own": {"name": "imagefolder", "path": "images"}}}
    absolute = with_absolute_paths(config_from_dict(settings))
    assert absolute.tasks["own"].path == str(tmp_path / "images")
