"""`evaluation.patience`: a run ends when validation accuracy does not improve, resumed or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import fedclip as package
from fedclip.config.loading import config_from_dict
from fedclip.errors import UsageError
from fedclip.experiment.class_coverage import Coverage
from fedclip.experiment.early_stopping import Patience
from fedclip.federated.engines.sharded import Processes
from fedclip.records import RunState
from tests.conftest import Command
from tests.support.machines import NAMES, FakeMail, coordinate_here, trainer, tree, write_images
from tests.support.runs import StopAfter, contents, with_

# At such a rate nothing changes: round 1 is the best, and round 3 the second without improvement.
IDLE = with_(
    client={"learning_rate": 1e-8},
    federation={"rounds": 6},
    evaluation={"patience": 2},
    data={"max_train_examples": 60, "validation_fraction": 0.2},
)


def records(*accuracies: float | None) -> list[dict[str, Any]]:
    return [{"server_round": n, "validation_accuracy": a} for n, a in enumerate(accuracies)]


@pytest.mark.parametrize(
    ("accuracies", "limit", "ends"),
    [
        ([0.1, 0.5, 0.6, 0.6, 0.55], 2, 4),  # an equal one is no improvement
        ([0.1, 0.5, 0.6, 0.6, 0.61], 2, None),
        ([0.9, 0.5, 0.4, 0.6], 2, None),  # before training is not counted
        ([0.1, 0.5, None, 0.4, None, 0.3], 2, 5),  # nor are rounds without an evaluation
        ([0.1, 0.5, 0.4], 1, 2),
        ([0.1, None, None, None], 1, None),
        ([0.1, 0.5, 0.4, 0.3], None, None),
    ],
)
def test_by_hand(accuracies: list[float | None], limit: int | None, ends: int | None) -> None:
    lines = records(*accuracies)
    patience = Patience(limit, 9, [])
    assert [line["server_round"] for line in lines if patience.hear(line)] == (
        [ends] if ends else []
    )
    assert Patience(limit, 9, lines).reason == patience.reason  # as a resumed run reads them
    assert Patience(limit, len(lines) - 1, lines).reason is None  # the last round is no early end


def test_the_reason_names_the_best_round() -> None:
    reason = Patience(2, 9, records(0.1, 0.5, 0.75, 0.6, 0.7)).reason
    assert reason == (
        "evaluation.patience: no better validation accuracy than round 2's (0.750) in 2 evaluations"
    )


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> package.Run:
    return package.run(IDLE, output=tmp_path_factory.mktemp("patience") / "run")


def test_a_run_ends_and_is_finished(ended: package.Run, fedclip: Command) -> None:
    assert ended.summary["rounds"] == 3
    assert ended.summary["stopped_by"].startswith("evaluation.patience: ")
    assert ended.summary["best"]["server_round"] == 1
    assert len((ended.folder / "metrics.jsonl").read_text().splitlines()) == 4
    before = contents(ended.folder)
    code, out, err = fedclip("run", "--resume", ended.folder)
    assert code == 0, err
    assert "nothing left to do" in err
    assert "after 3 rounds, ended early: evaluation.patience: no better" in out
    assert contents(ended.folder) == before
    assert package.evaluate(ended.folder)["accuracy"] == ended.summary["accuracy"]


@pytest.mark.parametrize("killed_after", [1, 3])
def test_a_killed_run_ends_in_the_same_bytes(
    ended: package.Run, tmp_path: Path, killed_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the round that it was to end with, whose checkpoint alone had been written."""
    with pytest.raises(KeyboardInterrupt):
        package.run(IDLE, output=tmp_path / "run", listener=StopAfter(killed_after))
    assert not (tmp_path / "run" / "summary.json").exists()
    told = []

    def first_start(self: Processes, finished: int, state: RunState) -> tuple[int, RunState]:
        told.append(finished)
        return finished, state

    monkeypatch.setattr(Processes, "first_start", first_start)
    again = package.resume(tmp_path / "run")
    assert told == [6 if killed_after == 3 else 1]  # others of several would train a round 4
    assert contents(tmp_path / "run") == contents(ended.folder)
    for name, value in ended.summary.items():
        assert name in ("seconds", "summary_sha256") or again.summary[name] == value, name


def test_it_needs_validation_examples(tmp_path: Path) -> None:
    config = with_(
        evaluation={"patience": 1, "keep_best": False}, data={"validation_fraction": 0.0}
    )
    with pytest.raises(UsageError, match=r"evaluation\.patience ends a run by validation accuracy"):
        package.run(config, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=r"evaluation\.patience.*whole number >= 1.*got 0"):
        config_from_dict({"evaluation": {"patience": 0}})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, None),
        ({"keep_best": True}, "the best round is"),
        ({"patience": 3}, "the end of the run is"),
        ({"patience": 3, "keep_best": True}, "the best round and the end of the run are"),
    ],
)
def test_classes_without_a_validation_image_are_named(
    keys: dict[str, Any], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(Coverage, "warn_of_validation", lambda self, what: told.append(what))
    Coverage(2, (), ("a",)).warn_of_choices(config_from_dict({"evaluation": keys}).evaluation)
    assert told == ([] if words is None else [words])


# --- over machines ---


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sites' images, and the coordinator's own, split for training, validation and testing."""
    root = write_images(tmp_path_factory.mktemp("images"))
    for part in ("train", "validation", "test"):
        shutil.copytree(root / "test", root / "own" / part)
    return root


def deployed(images: Path, **sections: Any) -> Any:
    values = tree(images, **sections)
    values["data"] |= {"path": str(images / "own")}
    return config_from_dict(values)


def test_a_coordinator_ends_its_run_too(images: Path, tmp_path: Path) -> None:
    config = deployed(
        images,
        client={"learning_rate": 1e-8},
        federation={"rounds": 4},
        evaluation={"patience": 1, "keep_best": True, "max_examples": None},
    )
    sites = {name: trainer(images, tmp_path, name).answer for name in NAMES}
    done, _ = coordinate_here(config, tmp_path / "run", FakeMail(sites))
    assert done.summary["rounds"] == 2
    assert done.summary["stopped_by"].startswith("evaluation.patience: ")
    last = json.loads((done.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert None not in last["accuracy_by_client"].values()  # the sites have tested the end
    assert (tmp_path / "north/adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"evaluation": {"patience": 1}, "federation": {"strategy": "fedsa"}}, "does not see"),
        ({"evaluation": {"keep_best": True}, "federation": {"ditto_mu": 0.1}}, "does not see"),
        ({"evaluation": {"patience": 1}, "data": {}}, "no validation examples .the coordinator's"),
    ],
)
def test_a_coordinator_refuses_what_it_cannot_judge(
    images: Path, tmp_path: Path, sections: dict[str, Any], why: str
) -> None:
    values = tree(images, **sections)
    if "data" not in sections:
        values["data"] |= {"path": str(images / "own")}
    with pytest.raises(UsageError, match=why):
        coordinate_here(config_from_dict(values), tmp_path / "run", FakeMail({}))
