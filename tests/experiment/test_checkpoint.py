"""What a resumed run compares: its checkpoint's bytes, and what the checkpoint belongs to."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

import fedclip
from fedclip.errors import DamagedFile, FedclipWarning, UsageError
from fedclip.experiment import identity
from fedclip.experiment.checkpoint import Checkpoint
from fedclip.experiment.checkpoint_file import checkpoint_bytes
from fedclip.experiment.folder import RunFolder
from fedclip.experiment.run import resume
from fedclip.reports.listener import Listener
from tests.support.runs import COMPARED, StopAfter
from tests.support.small import SMALL

CONFIG: dict[str, Any] = {
    "model": {"model_name": SMALL, "lora": {"r": 2, "last_layers": 1}},
    "data": {"name": "digits", "max_train_examples": 60, "batch_size": 8},
    "federation": {"rounds": 2, "num_clients": 2},
    "evaluation": {"max_examples": 20},
}
BYTES = [name for name in COMPARED if not name.startswith("adapter_best")]
LAST, BEFORE = "checkpoint.safetensors", "checkpoint_previous.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    return fedclip.run(CONFIG, output=tmp_path_factory.mktemp("whole") / "run").folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped after its first round."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(KeyboardInterrupt):
        fedclip.run(CONFIG, output=folder, listener=StopAfter(1))
    return folder


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def same_end(one: Path, other: Path) -> None:
    for name in BYTES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def edit(folder: Path, key: str, value: Any) -> None:
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    *way, last = key.split(".")
    at = tree
    for part in way:
        at = at[part]
    at[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


EDITS = {
    "seed": 1,
    "precision": "bf16",
    "device": "cpu",
    "model.model_name": "tiny",
    "model.lora.lora_alpha": 3.0,
    "model.lora.lora_dropout": 0.1,
    "model.lora.rank_pattern": {"vision_encoder": 1},
    "model.head": "linear",
    "client.local_epochs": 2,
    "client.proximal_mu": 0.1,
    "optimizer.schedule": "cosine",
    "optimizer.weight_decay": 0.5,
    "data.batch_size": 4,
    "data.templates": ["a {}"],
    "data.on_bad_image": "error",
    "data.partition.alpha": 0.1,
    "federation.rounds": 3,
    "federation.strategy": "ffa",
    "federation.clients_per_round": 1,
    "federation.ditto_mu": 0.1,
    "engine.name": "sequential",
    "engine.group_size": 1,
    "evaluation.max_examples": 30,
}


@pytest.mark.parametrize("key", EDITS)
def test_an_edited_configuration_is_refused_by_key(folder: Path, key: str) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "config.yaml"}
    edit(folder, key, EDITS[key])
    with pytest.raises(UsageError, match=rf"config\.yaml.*{key}.* was .*, now .*put the old") as e:
        resume(folder)
    assert e.value.exit_code == 2
    after = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "config.yaml"}
    assert after == before


def test_all_edits_are_named_together(folder: Path) -> None:
    edit(folder, "seed", 7)
    edit(folder, "data.batch_size", 4)
    with pytest.raises(UsageError, match=r"data\.batch_size was 8, now 4; seed was 0, now 7"):
        resume(folder)


def test_waiting_and_addresses_may_change(folder: Path, whole: Path) -> None:
    edit(folder, "deploy.round_deadline", 5.0)
    edit(folder, "deploy.address", "127.0.0.1:9")
    resume(folder)
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("base_sha256", "base model's weights or its preprocessing"),
        ("data_sha256", "the data, its partition"),
        ("layout_sha256", "tensors have other names or shapes"),
    ],
)
def test_what_else_the_checkpoint_belongs_to_is_compared(
    folder: Path, monkeypatch: pytest.MonkeyPatch, key: str, says: str
) -> None:
    real = identity.identity_of
    monkeypatch.setattr(identity, "identity_of", lambda parts: real(parts) | {key: "other"})
    with pytest.raises(UsageError, match=f"{says}.*; or start a new run"):
        resume(folder)


def test_other_conditions_are_said_and_do_not_stop(
    folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = identity.identity_of
    other = {"peft": "9.9", "threads": 77}
    monkeypatch.setattr(
        identity,
        "identity_of",
        lambda parts: (found := real(parts)) | {"environment": found["environment"] | other},
    )
    with pytest.warns(FedclipWarning, match=r"peft .*, now 9\.9; threads \d+, now 77"):
        resume(folder)
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    found = Checkpoint.load(RunFolder(folder))
    assert found is not None
    assert found.identity["environment"]["threads"] == 77


def test_the_base_and_the_data_make_the_identity(tmp_path: Path) -> None:
    """A model folder of other preprocessing is another base, whatever its weights."""
    base = Path(shutil.copytree(fedclip.base_folder("tiny"), tmp_path / "base"))
    config = {**CONFIG, "model": {**CONFIG["model"], "model_name": str(base)}}
    with pytest.raises(KeyboardInterrupt):
        fedclip.run(config, output=tmp_path / "run", listener=StopAfter(1))
    file = base / "preprocessor_config.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps(good | {"image_mean": [0.4, 0.5, 0.5]}))
    with pytest.raises(UsageError, match="weights or its preprocessing"):
        resume(tmp_path / "run")
    file.write_text(json.dumps(good))
    weights = base / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UsageError, match="weights or its preprocessing"):
        resume(tmp_path / "run")


def test_every_flipped_bit_is_noticed(folder: Path) -> None:
    """Anywhere in the file, header and numbers alike."""
    path, chance = folder / LAST, random.Random(0)
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    places = [chance.randrange(8, header) for _ in range(60)]
    for place in [*places, *(chance.randrange(header, len(raw)) for _ in range(140))]:
        data = bytearray(raw)
        data[place] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        with pytest.raises(UsageError):
            Checkpoint.load(RunFolder(folder))
    path.write_bytes(raw)
    assert Checkpoint.load(RunFolder(folder)) is not None


@pytest.mark.parametrize("damage", ["a bit", "gone"])
def test_the_checkpoint_before_takes_a_damaged_ones_place(
    folder: Path, whole: Path, damage: str
) -> None:
    path = folder / LAST
    if damage == "gone":  # as a kill between two names leaves it
        path.unlink()
        resume(folder)
    else:
        raw = bytearray(path.read_bytes())
        raw[-50] ^= 4
        path.write_bytes(raw)
        with pytest.warns(FedclipWarning, match=rf"{LAST} is damaged.*{BEFORE}.*round 0"):
            resume(folder)
    same_end(folder, whole)


@pytest.mark.parametrize("change", [lambda b: b[:-9], lambda b: b"", lambda b: b"noise" * 20])
def test_a_checkpoint_that_cannot_be_read_is_passed_over(folder: Path, change: Any) -> None:
    (folder / LAST).write_bytes(change((folder / LAST).read_bytes()))
    with pytest.warns(FedclipWarning, match=rf"{LAST} is damaged.*{BEFORE}.*round 0"):
        found = Checkpoint.load_usable(RunFolder(folder))
    assert found is not None
    assert found.finished_rounds == 0


def test_two_damaged_checkpoints_are_both_named(folder: Path) -> None:
    for name in (LAST, BEFORE):
        (folder / name).write_bytes(b"noise")
    with pytest.raises(UsageError, match=rf"{LAST} is damaged.*{BEFORE} is damaged"):
        resume(folder)
    (folder / BEFORE).unlink()
    with pytest.raises(UsageError, match=rf"{LAST} is damaged.*no {BEFORE}"):
        resume(folder)


@pytest.mark.parametrize("facts", [[1], {}, {"server_round": "x"}, {"server_round": 99}])
def test_a_rewritten_checkpoint_is_refused_and_not_passed_over(folder: Path, facts: Any) -> None:
    with safe_open(folder / LAST, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    meta = {**meta, **facts} if isinstance(facts, dict) else facts
    save_file(tensors, folder / LAST, {"meta": json.dumps(meta)})
    with pytest.raises(UsageError, match=LAST) as caught:
        resume(folder)
    assert not isinstance(caught.value, DamagedFile)


@pytest.mark.parametrize(
    "change",
    [
        {"server_round": None},
        {"server_round": True},
        {"server_round": -1},
        {"bytes_up": 1.5},
        {"best": []},
        {"identity": {}},
        {"more": 1},
    ],
)
def test_facts_of_wrong_kinds_are_refused(folder: Path, change: dict[str, Any]) -> None:
    """Even where the digest fits."""
    tensors, facts = RunFolder(folder).load_checkpoint() or pytest.fail("no checkpoint")
    (folder / LAST).write_bytes(checkpoint_bytes(tensors, facts | change))
    with pytest.raises(UsageError, match=f"is no checkpoint: {next(iter(change))}"):
        resume(folder)
    (folder / LAST).write_bytes(checkpoint_bytes({"elsewhere/a": torch.ones(1)}, facts))
    with pytest.raises(UsageError, match="is no checkpoint: it has a tensor in 'elsewhere'"):
        resume(folder)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("metrics.jsonl", lambda b: b.replace(b'"loss": ', b'"loss": 1'), "are not those that"),
        ("metrics.jsonl", lambda b: b.split(b"\n")[0] + b"\n", "ends before round 1"),
        ("metrics.jsonl", lambda b: b"", "ends before round 1"),
        ("metrics.jsonl", lambda b: b"5\n" + b, "line 1 is damaged: expected the record"),
        ("metrics.jsonl", lambda b: b"{}\n" + b, "line 1 is damaged: expected the record"),
        ("metrics.jsonl", lambda b: b + b"[" * 100000 + b"\n", "line 3 is damaged"),
        ("metrics.jsonl", lambda b: b + b"\xff\n", "line 3 is damaged"),
        ("metrics.jsonl", lambda b: b.replace(b"1", b"NaN"), "is damaged"),
        ("timing.jsonl", lambda b: b'{"server_round": true}\n', "line 1 is damaged"),
        ("timing.jsonl", lambda b: b'{"server_round": "x"}\n' + b, "line 1 is damaged"),
        ("partition.json", lambda b: b"[]", "expected a JSON object"),
        ("partition.json", lambda b: b"[" * 100000, "nested too deeply"),
        ("partition.json", lambda b: b[:-9], "is damaged"),
    ],
)
def test_other_damaged_files_are_named(folder: Path, name: str, change: Any, says: str) -> None:
    checkpoint = Checkpoint.load(RunFolder(folder))
    assert checkpoint is not None
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    run = RunFolder(folder)
    if name == "partition.json":
        read: Any = partial(run.read_json, name)
    else:
        read = partial(run.truncate_metrics, 1, checkpoint.metrics_sha256)
    with pytest.raises(UsageError, match=rf"{name}.*{says}"):
        read()


@pytest.mark.parametrize("text", ["[]", "[" * 100000, "5", '{"a": NaN}', '"\\ud800"', ""])
def test_a_damaged_summary_is_named(folder: Path, text: str) -> None:
    (folder / "summary.json").write_text(text)
    with pytest.raises(UsageError, match=r"summary\.json is damaged"):
        resume(folder)


CODE = """
from pathlib import Path
from fedclip.federated.strategies import FedAvg
Path({mark!r}).touch()
class Mine(FedAvg): pass
"""


class Heard(Listener):
    def __init__(self, mark: Path) -> None:
        self.mark, self.lines = mark, list[tuple[str, bool]]()

    def message(self, text: str) -> None:
        self.lines.append((text, self.mark.exists()))


def test_code_that_a_run_folder_names(tmp_path: Path) -> None:
    """It is run by `run` and `run --resume`, which says so first, and by nothing else."""
    from fedclip.adapters.inspect import evaluate, info

    code, mark, run = tmp_path / "mine.py", tmp_path / "ran", tmp_path / "run"
    code.write_text(CODE.format(mark=str(mark)))
    config = {**CONFIG, "federation": {"rounds": 2, "num_clients": 2, "strategy": f"{code}:Mine"}}
    with pytest.raises(KeyboardInterrupt):
        fedclip.run(config, output=run, listener=StopAfter(1))
    mark.unlink()
    good = code.read_text()
    code.write_text(good + "# changed\n")
    with pytest.raises(UsageError, match=r"code has changed since the run began.*mine\.py"):
        resume(run)
    assert not mark.exists()
    code.write_text(good)
    heard = Heard(mark)
    resume(run, listener=heard)
    told = [ran for text, ran in heard.lines if "run now" in text and str(code) in text]
    assert told == [False]
    assert mark.exists()
    mark.unlink()
    assert evaluate(run)["accuracy"] == info(run)["summary"]["accuracy"]
    assert not mark.exists()


def test_a_run_of_a_version_that_trained_otherwise_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "TRAINING", identity.TRAINING + 1)
    with pytest.raises(UsageError, match=r"a version of fedclip that trains otherwise; finish it"):
        resume(folder)
