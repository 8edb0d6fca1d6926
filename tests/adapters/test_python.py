"""Runs from Python: data in memory, a strategy from a cell, callbacks, and what a run shows."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

import fedclip
from fedclip.errors import UsageError
from fedclip.experiment.code_digest import class_sha256
from fedclip.federated.strategies import FedAvg, Setting
from tests.support.runs import StopAfter

CONFIG = {
    "model": {"model_name": "random:tiny", "lora": {"r": 2, "lora_alpha": 2}},
    "data": {"batch_size": 8},
    "federation": {"rounds": 2, "num_clients": 2},
    "evaluation": {"keep_best": True},
}
LABELS = np.arange(36) % 3
IMAGES = np.random.default_rng(0).integers(0, 256, (36, 10, 10, 3), dtype=np.uint8)
DATA = {"images": IMAGES, "labels": LABELS, "class_names": ["cat", "<dog>", "ape"]}
CAPTIONS = {"images": IMAGES, "captions": [f"number {label}" for label in LABELS]}
TEXT = "given stands for what is handed over in Python"


class Scaled(fedclip.Strategy):
    """The mean, times a factor."""

    needs_lora = False

    def __init__(self, setting=None, factor=1.0):
        super().__init__(setting)
        self.factor = factor

    def round(self, state, request, train):
        mean = {name: self.factor * tensor for name, tensor in train(request).mean().items()}
        return replace(state, shared={**state.shared, **mean})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on arrays with a class of this file, and what a function heard of it."""
    heard = []
    folder = tmp_path_factory.mktemp("python") / "<run>"
    run = fedclip.run(CONFIG, data=DATA, strategy=Scaled, output=folder, listener=heard.append)
    return run, heard


def test_config_yaml_tells_what_was_given(finished):
    config = yaml.safe_load((finished[0].folder / "config.yaml").read_text())
    assert config["data"]["name"] == "given"
    assert config["federation"]["strategy"] == "given:Scaled"
    assert finished[0].summary["strategy"] == "given:Scaled"


def test_a_function_hears_of_every_round(finished):
    run, heard = finished
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert heard == [json.loads(line) for line in lines]
    with pytest.raises(UsageError, match="a function of each round's record"):
        fedclip.run(CONFIG, data=DATA, listener=fedclip.Listener)


def test_metrics_are_one_row_a_round(finished):
    run, heard = finished
    frame = run.metrics
    assert frame["server_round"].tolist() == [0, 1, 2]
    assert frame["accuracy"].tolist() == [record["accuracy"] for record in heard]
    assert frame["client_accuracy.min"].iloc[2] == heard[2]["client_accuracy"]["min"]
    assert not [name for name in frame if "client-" in name]


def test_best_is_the_round_that_the_run_kept(finished):
    run, heard = finished
    assert run.best["server_round"] == run.summary["best"]["server_round"]
    assert run.best["accuracy"] == run.summary["best"]["accuracy"]
    number = run.best["server_round"]
    assert run.best == heard[number]


def test_a_run_without_validation_has_no_best(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"server_round": 0, "accuracy": 0.5}\n')
    run = fedclip.Run(tmp_path, {})
    assert run.best is None
    assert "best" not in run._repr_html_()


def test_what_a_notebook_shows(finished):
    run, _ = finished
    shown = run._repr_html_()
    assert f"{run.summary['accuracy']:.1%}" in shown
    assert "&lt;run&gt;/report.html" in shown
    assert "<run>" not in shown
    figure = run.plot()
    assert [axes.get_xlabel() for axes in figure.axes] == ["round", "round"]
    assert figure._repr_png_() == (run.folder / "curves.png").read_bytes()


def test_predict_takes_paths_pictures_and_arrays(finished, tmp_path):
    run, _ = finished
    Image.fromarray(IMAGES[0]).save(tmp_path / "0.png")
    path, picture = tmp_path / "0.png", Image.fromarray(IMAGES[0])
    found = run.predict([path, picture, IMAGES[0]])
    assert [one["image"] for one in found] == [str(path), 1, 2]
    scores = found[0]["scores"]
    for one in [*found, run.predict(path)[0], run.predict(picture)[0], run.predict(IMAGES[:2])[0]]:
        assert one["scores"] == pytest.approx(scores, abs=1e-5)
    assert run.predict(picture, ["moon"])[0]["label"] == "moon"
    for images, words in [
        (IMAGES / 255, r"images must be .*float64"),
        ([path, IMAGES[0] / 255], r"images\[1\] must be .*float64"),
        (IMAGES[0], "one colour image or 10 grey ones"),
        ([path, 3], r"images\[1\] must be a PIL image"),
        ([tmp_path / "none.png"], "there is no such image file"),
    ]:
        with pytest.raises(UsageError, match=words):
            run.predict(images)


def test_evaluate_needs_the_same_data_again(finished):
    run, _ = finished
    found = fedclip.evaluate(run.folder, data=DATA)
    assert found["accuracy"] == pytest.approx(run.summary["accuracy"])
    with pytest.raises(UsageError, match=rf"{TEXT}.*fedclip.evaluate\(folder, data=\.\.\.\)"):
        fedclip.evaluate(run.folder)
    swapped = LABELS.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    for other in ({"labels": swapped}, {"images": IMAGES[::-1]}, {"class_names": ["a", "b", "c"]}):
        with pytest.raises(UsageError, match="the data or its partition has changed"):
            fedclip.evaluate(run.folder, data=DATA | other)


def test_the_command_line_says_what_to_do(finished, fedclip, tmp_path):
    run, _ = finished
    for name, config in {
        "d": "data: {name: given}",
        "s": "federation: {strategy: given:S}",
    }.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(config)
        for words in (["validate", file], ["run", file]):
            code, _, error = fedclip(*words)
            assert code == 2, words
            assert name == "s" or TEXT in error
    code, _, error = fedclip("evaluate", run.folder)
    assert (code, TEXT in error) == (2, True)
    told = fedclip("info", run.folder)
    assert told[0] == 0, told


def test_a_stopped_run_goes_on_with_the_same_objects_only(tmp_path):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    given = {"data": DATA, "strategy": Scaled(factor=0.5)}
    with pytest.raises(KeyboardInterrupt):
        fedclip.run(CONFIG, **given, output=stopped, listener=StopAfter(1))
    for changed, words in [
        ({"data": None}, rf"data.name: {TEXT}"),
        ({"strategy": None}, "federation.strategy: given:Scaled stands for"),
        ({"data": DATA | {"labels": LABELS[::-1]}}, "the data, its partition, .* are not those"),
        ({"strategy": Scaled(factor=0.6)}, "code has changed .*given:Scaled"),
        ({"strategy": FedAvg}, "begun with given:Scaled, got given:FedAvg"),
    ]:
        with pytest.raises(UsageError, match=words):
            fedclip.resume(stopped, **(given | changed))
    assert fedclip.resume(stopped, **given).summary["rounds"] == 2
    fedclip.run(CONFIG, **given, output=whole)
    for name in ("metrics.jsonl", "checkpoint.safetensors", "adapter/adapter_model.safetensors"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_class_from_a_cell_equals_the_built_in_one(tmp_path):
    cell = """
class Mean(fedclip.Strategy):
    needs_lora = False

    def round(self, state, request, train):
        return replace(state, shared={**state.shared, **train(request).mean()})
"""
    scope = {"fedclip": fedclip, "replace": replace, "__name__": "__main__"}
    exec(cell, scope)
    federation = CONFIG["federation"] | {"strategy": scope["Mean"]}
    own = fedclip.run(CONFIG | {"federation": federation}, data=DATA, output=tmp_path / "own")
    built_in = fedclip.run(CONFIG, data=DATA, strategy="fedavg", output=tmp_path / "built-in")
    assert own.summary["strategy"] == "given:Mean"
    assert built_in.summary["strategy"] == "fedavg"
    assert own.summary["adapter_sha256"] == built_in.summary["adapter_sha256"]


def test_info_counts_a_linear_head_of_given_classes(tmp_path):
    config = CONFIG | {"model": CONFIG["model"] | {"head": "linear"}}
    run = fedclip.run(config, data=DATA, output=tmp_path / "run")
    facts = fedclip.info(run.folder)
    assert facts["trainable_parameters"] == run.summary["trainable_parameters"]


def test_arguments_that_do_not_fit(tmp_path, finished):
    two = CONFIG | {"federation": {"strategy": Scaled}}
    tasks = CONFIG | {"tasks": {"a": {"name": "digits"}, "b": {"name": "icons"}}}
    for config, given, words in [
        (CONFIG, {"strategy": dict}, "strategy must be a name, a class that extends"),
        (CONFIG, {"strategy": 3}, "strategy must be a name"),
        (CONFIG, {"strategy": "fedagv"}, "did you mean fedavg"),
        (CONFIG, {"strategy": Scaled(Setting(seed=3))}, "made with a Setting"),
        (two, {"strategy": Scaled}, "strategy is given twice"),
        (tasks, {"data": DATA}, "the configuration has tasks"),
        (CONFIG | {"data": {"path": "x"}}, {"data": DATA}, "data.path: x names a data set"),
        (CONFIG | {"data": 3}, {"data": DATA}, "data must be a mapping"),
        (CONFIG | {"rounds": 3}, {"data": DATA}, "unknown key rounds"),
        (CONFIG, {"data": CAPTIONS}, "holds captions, not classes; set task: contrastive"),
        (
            CONFIG | {"federation": {"dynamic_ranks": {"enabled": True}}},
            {"strategy": Scaled},
            "dynamic_ranks",
        ),
    ]:
        with pytest.raises(UsageError, match=words):
            fedclip.run(config, **given, output=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    digits = tmp_path / "digits"
    digits.mkdir()
    (digits / "config.yaml").write_text("data: {name: digits}")
    with pytest.raises(UsageError, match=r"has data\.name: digits; leave data= out"):
        fedclip.resume(digits, data=DATA)


def test_the_digest_of_a_class_is_that_of_its_code():
    def make(text, factor=1):
        scope = {"Base": fedclip.Strategy, "factor": factor}
        exec(f"class S(Base):\n    a = 1\n    def round(self, *x):\n        {text}", scope)
        return scope["S"]

    same = class_sha256(make("return x[0]  # one"))
    assert same == class_sha256(make("return x[0]"))
    assert same != class_sha256(make("return x[1]"))
    changed = make("return x[0]")
    changed.a = 2
    assert same != class_sha256(changed)
    assert class_sha256(Scaled(factor=1.0)) != class_sha256(Scaled(factor=2.0))
    assert class_sha256(Scaled(factor=2.0)) == class_sha256(Scaled(factor=2.0))
