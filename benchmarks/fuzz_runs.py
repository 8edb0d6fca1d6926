"""Damaged run folders: of runs that were stopped (their checkpoints), and of finished ones."""

from __future__ import annotations

import atexit
import hashlib
import json
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

import fedclip
from benchmarks.common import ROOT
from benchmarks.fuzz_damage import (
    Damage,
    Damaged,
    copied,
    in_json,
    in_lines,
    in_place_of,
    in_tensors,
    in_tree,
    in_yaml,
)
from benchmarks.small_runs import RUNS
from fedclip.adapters.card import run_card
from fedclip.adapters.inspect import evaluate, info, load_run_model, predict
from fedclip.config.loading import load_config
from fedclip.experiment.build import build, check_split_rule
from fedclip.experiment.checkpoint import Checkpoint
from fedclip.experiment.checkpoint_file import checkpoint_bytes, read_checkpoint
from fedclip.experiment.context import RunContext
from fedclip.experiment.folder import CHECKPOINT, CONFIG, METRICS, PREVIOUS, SUMMARY, RunFolder
from fedclip.experiment.identity import check_config, take_up
from fedclip.experiment.run import resume
from fedclip.models.state import adapter_sha256
from fedclip.reports.listener import Listener

KEPT = ("fedavg", "scaffold", "ranks", "tasks")
"""Runs whose checkpoints hold different things."""
ENDED = ("fedavg", "tasks")
"""Runs that are used after their end."""
OLD = "old"
"""A run of an older version, which is used as well."""
DAMAGE: dict[str, Damage] = {
    ".yaml": in_yaml,
    ".json": in_json,
    ".jsonl": in_lines,
    ".safetensors": in_tensors,
}
"""By the end of a file's name."""
END = (METRICS, CHECKPOINT, "adapter/adapter_model.safetensors", "adapter/fedclip.json")
"""Files that a resumed run must end with byte for byte."""


class Stop(Listener):
    """Ends a run after a round as a kill would."""

    def __init__(self, server_round: int) -> None:
        """After which round."""
        self.server_round = server_round

    def round(self, record: Mapping[str, Any]) -> None:
        """Raises once the round is there."""
        if record["server_round"] == self.server_round:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Stopped:
    """A run stopped before its last round: its folder, context, and what can be taken from it."""

    folder: Path
    context: RunContext
    known: frozenset[str]  # digests of its checkpoints
    metrics: bytes


@dataclass(frozen=True)
class Case:
    """A damaged folder of one of KEPT, and how it is used.

    `forged` is damage with a digest made to fit: it must be refused or used, without a surprise.
    `bare` is a run without digests, of an older version: there, too.
    """

    run: str
    folder: Path
    what: str
    forged: bool = False
    door: str = ""
    whole: bool = False
    bare: bool = False


def make_checkpoint(rng: random.Random, place: Path) -> Case:
    """A stopped run with its last checkpoint damaged, sometimes the one before it too."""
    name = rng.choice(KEPT)
    folder = copied(stopped(name).folder, place / "run")
    last, before = folder / CHECKPOINT, folder / PREVIOUS
    how = rng.randrange(10)
    if how < 5:
        last.write_bytes(in_tensors(rng, last.read_bytes()))
    elif how == 5:
        for path in (last, before):
            path.write_bytes(in_tensors(rng, path.read_bytes()))
    elif how == 6:
        in_place_of(rng, rng.choice([last, before]))
    elif how == 7:  # that of another run, or of another time
        other = stopped(rng.choice(KEPT)).folder
        shutil.copy(rng.choice([other / CHECKPOINT, other / PREVIOUS]), last)
    elif how == 8:
        metrics = folder / METRICS
        metrics.write_bytes(in_lines(rng, metrics.read_bytes()))
    else:
        last.write_bytes(_forged(rng, last))
    forged, whole = how == 9, rng.random() < 0.03
    return Case(name, folder, f"checkpoint {how}", forged=forged, whole=whole)


def read_checkpoint_case(case: Case) -> None:
    """Takes up a damaged run as `fedclip run --resume` does, now and then to its end."""
    run = stopped(case.run)
    folder = RunFolder.open(case.folder)
    check_split_rule(folder)
    check_config(load_config(folder.path / CONFIG), folder, Listener())
    checkpoint = take_up(run.context, folder)
    folder.truncate_metrics(checkpoint.finished_rounds, checkpoint.metrics_sha256)
    if not case.forged:
        if checkpoint.finished_rounds >= 0 and _digest(checkpoint) not in run.known:
            raise Damaged("a checkpoint that was never written is taken")
        if not run.metrics.startswith((folder.path / METRICS).read_bytes()):
            raise Damaged("metrics that were never written are kept")
    if case.whole or case.forged:
        ended = resume(folder.path).folder
        if not case.forged:
            _same(ended, finished(case.run))


def make_run(rng: random.Random, place: Path) -> Case:
    """A stopped or finished run with one or two of its files damaged."""
    if rng.random() < 0.3:
        name = rng.choice(KEPT)
        source, door = stopped(name).folder, "resume"
    else:
        name, door = rng.choice([*ENDED, OLD]), rng.choice(list(DOORS))
        source = finished(name)
    folder = copied(source, place / "run")
    bare = name == OLD or (door != "resume" and rng.random() < 0.1)
    if bare:
        _strip(folder / SUMMARY)
    files = sorted(path for path in folder.rglob("*") if path.suffix in DAMAGE)
    damaged = rng.sample(files, rng.choice([1, 1, 1, 2]))
    for path in damaged:
        if rng.random() < 0.06:
            in_place_of(rng, path)
        else:
            path.write_bytes(DAMAGE[path.suffix](rng, path.read_bytes()))
    names = ", ".join(path.relative_to(folder).as_posix() for path in damaged)
    return Case(name, folder, f"{door}: {names}", door=door, bare=bare)


def read_run(case: Case) -> None:
    """Uses a damaged run as a command does; what it tells must be what the whole one tells."""
    if case.door == "resume":
        read_checkpoint_case(case)
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = DOORS[case.door](case.folder)
    if case.bare:
        return
    right = _right(case.door, case.run)
    if case.door == "info" and not (case.folder / SUMMARY).is_file():  # a run without its end
        right = {key: value for key, value in right.items() if key != "summary"}
    told = any("has changed since the run ended" in str(w.message) for w in said)
    if found != right and not told:
        raise Damaged(f"{case.what}: what is told differs, without a word")


def _loaded(folder: Path) -> Any:
    model = load_run_model(folder)
    return [adapter_sha256(model.get_parameters()), model.class_names, model.templates]


def _of_a_task(folder: Path) -> Any:
    inner = folder / "adapter_of" / "one"
    return _loaded(inner if inner.exists() else folder)


def _predicted(folder: Path) -> Any:
    picture = workplace() / "picture.png"
    if not picture.exists():
        Image.linear_gradient("L").resize((32, 32)).save(picture)
    return predict(folder, [picture])


def _strip(path: Path) -> None:
    summary = json.loads(path.read_text())
    kept = {k: v for k, v in summary.items() if k not in ("summary_sha256", "records_sha256")}
    path.write_text(json.dumps(kept))


def _counted(folder: Path) -> Any:
    return json.loads(json.dumps(info(folder)))


DOORS: dict[str, Callable[[Path], Any]] = {
    "info": _counted,
    "evaluate": evaluate,
    "card": run_card,
    "card of the best": lambda folder: run_card(folder, best=True),
    "load": _loaded,
    "load a task's": _of_a_task,
    "predict": _predicted,
    "resume finished": lambda folder: resume(folder).summary,
}


@cache
def _right(door: str, name: str) -> Any:
    return DOORS[door](finished(name))


@cache
def stopped(name: str) -> Stopped:
    """One of KEPT, stopped after its second round; made once."""
    config, place = RUNS[name], workplace()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(KeyboardInterrupt):
            fedclip.run(config, output=place / name, listener=Stop(2))
        context = build(load_config(place / name / CONFIG), Listener())
    folder = RunFolder(place / name)
    known = {_digest(Checkpoint._read(folder.path / file)) for file in (CHECKPOINT, PREVIOUS)}
    return Stopped(
        folder.path,
        context,
        frozenset(known),
        (folder.path / METRICS).read_bytes(),
    )


@cache
def finished(name: str) -> Path:
    """A finished run; made once."""
    if name == OLD:
        return ROOT / "tests/support/files/run_b6f3d3e"
    folder = Path(shutil.copytree(stopped(name).folder, workplace() / f"{name}-whole"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return resume(folder).folder


@cache
def workplace() -> Path:
    """A folder for what is made once; it goes with the process."""
    place = Path(tempfile.mkdtemp(prefix="fedclip-fuzz-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def _forged(rng: random.Random, path: Path) -> bytes:
    """A checkpoint with other facts, and a digest that fits them."""
    tensors, facts = read_checkpoint(path)
    made = in_tree(rng, facts)
    return checkpoint_bytes(tensors, made if isinstance(made, dict) else {"": made})


def _digest(checkpoint: Checkpoint) -> str:
    best = checkpoint.best_state.flat() if checkpoint.best_state else {}
    facts = [
        checkpoint.finished_rounds,
        checkpoint.best,
        checkpoint.bytes_up,
        checkpoint.bytes_down,
        checkpoint.metrics_sha256,
        adapter_sha256(checkpoint.state.flat()),
        adapter_sha256(best),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _same(folder: Path, whole: Path) -> None:
    for name in END:
        if (folder / name).read_bytes() != (whole / name).read_bytes():
            raise Damaged(f"a resumed run ends with another {name}")
