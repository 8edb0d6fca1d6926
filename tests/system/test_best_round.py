"""The best round by validation: `--best` at every door of a finished run."""

from __future__ import annotations

import inspect as signatures
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import fedclip as package
from fedclip.adapters import push as pushing
from fedclip.adapters.card import run_card
from fedclip.adapters.export import export
from fedclip.adapters.inspect import evaluate, info
from fedclip.adapters.load import load_run_model
from fedclip.adapters.predict import Predictor, predict
from fedclip.adapters.serve import start
from fedclip.cli import main
from fedclip.errors import UsageError
from fedclip.experiment.checkpoint import Checkpoint
from tests.conftest import Command
from tests.support.runs import with_
from tests.system.test_old_run import KEPT
from tests.system.test_tasks import config as tasks_config

DOORS = ("evaluate", "info", "card", "predict", "serve", "export", "push")
TINY = {"model_name": "random:tiny"}  # with a tokenizer, so that it can be exported
TWO_ROUNDS = {
    "optimizer": {"schedule": "constant"},
    "client": {"learning_rate": 0.1},
    "evaluation": {"keep_best": True, "metrics": ["balanced_accuracy"]},
}
KINDS = {
    "shared": with_(model=TINY, federation={"rounds": 2}, **TWO_ROUNDS),
    "personal": with_(model=TINY, federation={"rounds": 2, "strategy": "fedsa"}, **TWO_ROUNDS),
    "tasks": tasks_config(model_name="random:tiny")
    | {"evaluation": {"keep_best": True, "max_examples": 40}},
}


@pytest.fixture(scope="module", params=KINDS)
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> package.Run:
    """A run of two rounds whose validation, it is made to believe, was better in the first."""
    believed = Checkpoint.keep_if_best

    def keep(self: Checkpoint, record: dict[str, Any]) -> None:
        believed(self, record | {"validation_accuracy": 1 / record["server_round"]})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "keep_if_best", keep)
        run = package.run(KINDS[request.param], output=tmp_path_factory.mktemp("best") / "run")
    assert run.summary["best"]["server_round"] == 1
    return run


def lines(run: package.Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def picture(tmp_path: Path) -> Path:
    file = tmp_path / "x.png"
    Image.fromarray(np.arange(64 * 3, dtype=np.uint8).reshape(8, 8, 3)).save(file)
    return file


def weights(adapter: Path) -> dict[str, Any]:
    return {n: t.tolist() for n, t in load_file(adapter / "adapter_model.safetensors").items()}


def test_its_figures_are_those_of_that_round(kept: package.Run) -> None:
    first, last = lines(kept)[1:]
    assert kept.summary["best"]["accuracy"] == first["accuracy"]
    assert kept.summary["accuracy"] == last["accuracy"]
    best, usual = evaluate(kept.folder, best=True), evaluate(kept.folder)
    told = info(kept.folder, best=True)["summary"]
    assert (told["rounds"], info(kept.folder)["summary"]["rounds"]) == (1, 2)
    for name in ("accuracy", "validation_accuracy", "macro_f1", "worst_class", "client_accuracy"):
        assert best[name] == told[name] == first[name], name
        assert usual[name] == last[name], name
    for name in told.keys() & last.keys():  # whatever is a figure of a round
        assert told[name] == (first if kept.summary[name] == last[name] else kept.summary)[name]
    for name in kept.summary.get("metrics", ()):
        assert best[name] == told[name] == first[name]
        assert told[f"validation_{name}"] == first[f"validation_{name}"]
    for task, figures in told.get("tasks", {}).items():
        assert figures["accuracy"] == first["accuracy_by_task"][task]
        assert figures["worst_class"] == first["worst_class_by_task"][task]
        assert figures["clients"] == kept.summary["tasks"][task]["clients"]
    assert "state_sha256" not in told  # that of the last round's state


def test_its_adapter_is_used(kept: package.Run, tmp_path: Path) -> None:
    other = kept.folder / "adapter_best"
    assert weights(other) != weights(kept.adapter)
    export(kept.folder, "peft", tmp_path / "peft", best=True)
    assert weights(tmp_path / "peft") == weights(other)
    image = picture(tmp_path)
    by_path = predict(other, [image])
    assert predict(kept.folder, [image], best=True) == by_path
    if "fedsa" not in kept.summary["strategy"]:  # whose shared B is nobody's
        assert predict(kept.folder, [image]) != by_path
    model = load_run_model(kept.folder, best=True)
    found = Predictor.of_run(kept.folder, best=True).model.get_parameters()
    assert all(tensor.equal(found[name]) for name, tensor in model.get_parameters().items())
    export(kept.folder, "merged", tmp_path / "merged", best=True)
    export(other, "merged", tmp_path / "path")
    whole = [tmp_path / name / "model.safetensors" for name in ("merged", "path")]
    assert whole[0].read_bytes() == whole[1].read_bytes()


def test_its_card_has_its_figures(kept: package.Run) -> None:
    if "tasks" in kept.summary:
        with pytest.raises(UsageError, match=r"has several tasks.*adapter_of"):
            run_card(kept.folder)
        return
    first = lines(kept)[1]
    card, usual = run_card(kept.folder, best=True), run_card(kept.folder)
    own = "Measured with the clients' own adapters" in usual
    assert own == ("fedsa" in kept.summary["strategy"])
    assert "The adapter is that of round 1 (of 2 that were asked for), the best by" in card
    assert f"| trained | {first['accuracy']:.3f} |" in card
    assert f"| lowest client | {first['client_accuracy']['min']:.3f} |" in card
    assert "1 rounds, " in card
    assert "best by validation" not in usual


@pytest.mark.parametrize("kept", ["shared"], indirect=True)
def test_the_commands_take_it(kept: package.Run, fedclip: Command, tmp_path: Path) -> None:
    image, first = picture(tmp_path), lines(kept)[1]
    best = first["accuracy"]
    for command in (("evaluate",), ("info",)):
        code, out, err = fedclip(*command, kept.folder, "--best", "--json")
        assert code == 0, err
        facts = json.loads(out)
        assert facts.get("summary", facts)["accuracy"] == best
    code, out, err = fedclip("predict", kept.folder, image, "--best", "--json")
    assert code == 0, err
    assert json.loads(out)[0]["label"] == predict(kept.folder, [image], best=True)[0]["label"]
    code, out, err = fedclip("card", kept.folder, "--best")
    assert (code, out) == (0, run_card(kept.folder, best=True)), err
    copy = shutil.copytree(kept.folder, tmp_path / "copy")
    code, _, err = fedclip("export", copy, "--best", "--to", "peft")
    assert code == 0, err
    assert weights(tmp_path / "copy-best-peft") == weights(kept.folder / "adapter_best")
    _, out, _ = fedclip("run", "--resume", kept.folder)
    assert (
        f"best round by validation: 1, validation accuracy 1.000, test accuracy {best:.3f}; --best"
        in out
    )


@pytest.mark.parametrize("kept", ["shared", "personal"], indirect=True)
def test_the_server_and_the_hub_get_it(kept: package.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi")
    served: list[Predictor] = []

    class Server:
        def __init__(self, config: Any) -> None:
            pass

        def run(self, sockets: Any) -> None:
            pass

    monkeypatch.setattr("uvicorn.Server", Server)
    monkeypatch.setattr(
        "fedclip.adapters.serve.app.create_app", lambda predictor, **keys: served.append(predictor)
    )
    keys: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "max_mb": 1, "labels": None}
    start.serve(kept.folder, best=True, say=lambda text: None, warn=print, **keys)
    found = served[0].model.get_parameters()
    wanted = load_run_model(kept.folder, best=True).get_parameters()
    assert all(tensor.equal(found[name]) for name, tensor in wanted.items())

    sent: dict[str, Any] = {}

    class Hub:
        def create_repo(self, repo_id: str, **keys: Any) -> str:
            return repo_id

        def upload_folder(self, *, folder_path: Path, **keys: Any) -> None:
            sent["weights"] = weights(Path(folder_path))
            sent["card"] = (Path(folder_path) / "README.md").read_text()

    monkeypatch.setattr(pushing.huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(pushing.huggingface_hub, "get_token", lambda: "x")
    pushing.push(kept.folder, "me/it", best=True)
    assert sent["weights"] == weights(kept.folder / "adapter_best")
    assert sent["card"] == run_card(kept.folder, "me/it", best=True)


def test_every_command_on_a_run_has_the_option() -> None:
    commands = {c.callback.__name__: c.callback for c in main.app.registered_commands if c.callback}
    having = set()
    for name, callback in commands.items():
        if "best" in signatures.signature(callback).parameters:
            having.add(name)
    assert having == set(DOORS)


USES: dict[str, Callable[[Path, Path], Any]] = {
    "evaluate": lambda run, to: evaluate(run, best=True),
    "info": lambda run, to: info(run, best=True),
    "card": lambda run, to: run_card(run, best=True),
    "predict": lambda run, to: predict(run, [picture(to)], best=True),
    "model": lambda run, to: load_run_model(run, best=True),
    "peft": lambda run, to: export(run, "peft", to / "out", best=True),
    "merged": lambda run, to: export(run, "merged", to / "out", best=True),
    "push": lambda run, to: pushing.push(run, "me/it", best=True),
}


@pytest.fixture(scope="module")
def last_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = with_(federation={"rounds": 1}, evaluation={"keep_best": False})
    return package.run(config, output=tmp_path_factory.mktemp("last") / "run").folder


@pytest.mark.parametrize("use", USES)
def test_a_run_that_kept_none_says_so(use: str, last_only: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"kept no best round, .*--best.*evaluation\.keep_best"):
        USES[use](last_only, tmp_path)


@pytest.mark.parametrize("use", ["info", "predict", "peft", "merged"])
def test_it_is_for_run_folders(use: str, finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is one adapter of a run; --best .*run's folder"):
        USES[use](finished_run / "adapter", tmp_path)
    away = shutil.copytree(finished_run / "adapter", tmp_path / "away")
    with pytest.raises(UsageError, match="is not a run folder"):
        USES[use](away, tmp_path)
    lost = shutil.copytree(finished_run, tmp_path / "lost")
    shutil.rmtree(lost / "adapter_best")
    with pytest.raises(UsageError, match="has lost its folder adapter_best"):
        USES[use](lost, tmp_path)


@pytest.mark.parametrize("kept", ["shared"], indirect=True)
def test_one_of_another_run_is_refused(
    finished_run: Path, kept: package.Run, tmp_path: Path
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(run / "adapter_best")
    shutil.copytree(kept.folder / "adapter_best", run / "adapter_best")
    with pytest.raises(UsageError, match="is not the adapter that the run saved there"):
        load_run_model(run, best=True)


def test_a_run_of_an_older_version(tmp_path: Path) -> None:
    run = shutil.copytree(KEPT, tmp_path / "run")
    told = info(run, best=True)["summary"]
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[told["rounds"]])
    assert told["accuracy"] == line["accuracy"]
    assert f"| trained | {line['accuracy']:.3f} |" in run_card(run, best=True)
    export(run, "peft", tmp_path / "peft", best=True)
    assert weights(tmp_path / "peft") == weights(run / "adapter_best")
