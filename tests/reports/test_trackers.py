"""Trackers: the numbers of `metrics.jsonl`, once each, whatever becomes of run and tracker."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import fedclip
from fedclip.config.loading import config_from_dict
from fedclip.errors import FedclipWarning, UsageError
from fedclip.reports.trackers import worker as worker_module
from fedclip.reports.trackers.tracker import MOST_CLIENTS, TrackedRun, Tracker, figures_of
from fedclip.reports.trackers.tracking import Tracking, tracker_classes
from tests.support.runs import CONFIG, StopAfter, with_

CONFIGURATION = config_from_dict(CONFIG)


class Book(Tracker):
    """A tracker that keeps what it is told in `books`, by the run's key."""

    books: ClassVar[dict[str, list[tuple[int, dict[str, float], float]]]] = {}
    ended: ClassVar[dict[str, bool]] = {}

    def open(self) -> int:
        self.book = self.books.setdefault(self.run.key, [])
        return self.book[-1][0] if self.book else -1

    def log(self, server_round: int, figures: Any, at: float) -> None:
        self.book.append((server_round, dict(figures), at))

    def close(self, finished: bool) -> None:
        self.ended[self.run.key] = finished


def add_round(folder: Path, number: int, **figures: Any) -> dict[str, Any]:
    """Writes a round's lines as a run does, and returns the record."""
    record = {"server_round": number, "loss": 1.0 / (number + 1), **figures}
    for name, line in (("metrics", record), ("timing", {"seconds": 2.0, "training_seconds": 1.0})):
        with (folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    return record


def tracking(folder: Path, own: type[Tracker], rounds: range, **figures: Any) -> Tracking:
    """A run that goes through some rounds and is then left without a word."""
    found = Tracking({"own": own}, folder, lambda text: None)
    found.start(CONFIGURATION)
    if rounds.start:
        found.rounds(rounds.start - 1, 9, 2)
    for number in rounds:
        found.round(add_round(folder, number, **figures))
    return found


def ended(found: Tracking, finished: bool = True) -> None:
    if finished:
        found.finish({})
    found.__exit__(None, None, None)


def book(folder: Path) -> list[tuple[int, dict[str, float], float]]:
    return Book.books[json.loads((folder / "tracking.json").read_text())["run"]]


# --- what a tracker is told ---


def test_a_rounds_figures_are_the_numbers_of_its_line_by_their_path() -> None:
    record = {
        "server_round": 3,
        "loss": 0.5,
        "accuracy": None,
        "clients": {"hospital": {"loss": 0.25, "steps": 7}},
        "worst_class": {"name": "cat", "recall": 0.1},
        "left_out": [{"client": "a", "reason": "slow"}],
        "flag": True,
        "hits": "01",
    }
    times = {"seconds": 2.5, "training_seconds": 2, "clients": {"hospital": 2}}
    assert figures_of(record, times) == {
        "loss": 0.5,
        "clients/hospital/loss": 0.25,
        "clients/hospital/steps": 7,
        "worst_class/recall": 0.1,
        "left_out": 1,
        "seconds": 2.5,
        "training_seconds": 2,
    }


def test_of_many_clients_none_is_logged_by_itself() -> None:
    clients = {f"client-{i}": {"loss": 1.0} for i in range(MOST_CLIENTS + 1)}
    assert figures_of({"server_round": 1, "clients": clients}, {}) == {}
    clients.popitem()
    assert len(figures_of({"server_round": 1, "clients": clients}, {})) == MOST_CLIENTS


def test_rounds_come_in_their_order_with_their_times(tmp_path: Path) -> None:
    ended(tracking(tmp_path, Book, range(3)))
    began = json.loads((tmp_path / "tracking.json").read_text())["began"]
    assert [(number, figures["loss"]) for number, figures, _ in book(tmp_path)] == [
        (0, 1.0),
        (1, 1 / 2),
        (2, 1 / 3),
    ]
    assert [round(at - began, 6) for _, _, at in book(tmp_path)] == [2.0, 4.0, 6.0]
    assert list(Book.ended.values())[-1] is True


# --- kills, resumes, faults ---


def test_what_a_kill_kept_from_the_tracker_comes_at_the_resume_and_nothing_twice(
    tmp_path: Path,
) -> None:
    ended(tracking(tmp_path, Book, range(3)), finished=False)
    add_round(tmp_path, 3)  # written, and the process killed before its tracker heard of it
    ended(tracking(tmp_path, Book, range(4, 6)))
    assert [number for number, _, _ in book(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_a_run_that_was_killed_after_its_last_round_is_completed_too(tmp_path: Path) -> None:
    ended(tracking(tmp_path, Book, range(2)), finished=False)
    add_round(tmp_path, 2)
    ended(tracking(tmp_path, Book, range(3, 3)))
    assert [number for number, _, _ in book(tmp_path)] == [0, 1, 2]


class Fails(Book):
    """Fails at some rounds, the first time, as a server that is away for a while."""

    fails: ClassVar[set[int]] = set()

    def log(self, server_round: int, figures: Any, at: float) -> None:
        if server_round in self.fails:
            self.fails.remove(server_round)
            raise OSError("out of reach")
        super().log(server_round, figures, at)


def test_a_fault_costs_one_warning_and_leaves_no_gap(tmp_path: Path) -> None:
    Fails.fails = {1}
    with pytest.warns(FedclipWarning) as warned:
        ended(tracking(tmp_path, Fails, range(5)))
    assert [str(one.message) for one in warned] == [
        "tracking: own: OSError: out of reach; the run goes on, and metrics.jsonl has its figures"
    ]
    assert [number for number, _, _ in book(tmp_path)] == [0, 1, 2, 3, 4]


class Silent(Book):
    """A server that takes the connection and says nothing."""

    released = threading.Event()

    @property
    def server(self) -> str:
        return "http://silent.example"

    def ask_server(self) -> None:
        self.released.wait()


def test_the_run_waits_for_no_silent_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_UNANSWERED", 0.01)
    with pytest.warns(FedclipWarning, match=r"http://silent.example does not answer; the run goes"):
        ended(tracking(tmp_path, Silent, range(3)))  # the thread still waits
    Silent.released.set()


class Mute(Tracker):
    """A tracker that somebody forgot to finish: it opens, and logs nothing."""

    def open(self) -> int:
        return -1


def test_a_tracker_that_cannot_log_is_refused_before_the_first_round(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tracking: own cannot be made: .*Mute.* log"):
        tracking(tmp_path, Mute, range(0))


class Remote(Book):
    """A tracker with a server at an address."""

    address = ""

    @property
    def server(self) -> str:
        return self.address

    def load(self) -> None:
        raise AssertionError("nothing is imported for a server that is not there")


def test_a_dead_port_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_UNANSWERED", 60.0)  # a refusal is heard at once
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        Remote.address = f"http://me:secret@127.0.0.1:{taken.getsockname()[1]}"
        with pytest.warns(FedclipWarning) as warned:
            ended(tracking(tmp_path, Remote, range(4)))
    assert len(warned) == 1
    assert "does not answer ([Errno 111] Connection refused)" in str(warned[0].message)
    assert "secret" not in str(warned[0].message)


@pytest.mark.parametrize(
    ("address", "server"),
    [
        *[("", False), ("sqlite:////a/b.db", False), ("file:/a", False), ("/a/b", False)],
        *[("http://host:5000", True), ("postgresql+psycopg2://me@host/db", True)],
    ],
)
def test_stores_of_mlflow_that_are_servers_are_known(
    address: str, server: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fedclip.reports.trackers.mlflow import MLflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert (MLflow(TrackedRun(tmp_path, "0", 1.5, {})).server is not None) is server


def test_a_data_base_that_is_away_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fedclip.reports.trackers.mlflow import MLflow

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"mysql://127.0.0.1:{taken.getsockname()[1]}/x")
        with pytest.raises(OSError, match="refused"):
            MLflow(TrackedRun(tmp_path, "0", 1.5, {})).ask_server()


@pytest.mark.parametrize(
    ("mode", "sent"), [("", False), ("offline", False), ("dryrun", False), ("online", True)]
)
def test_wandb_is_offline_unless_it_is_asked_for(
    mode: str, sent: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fedclip.reports.trackers.wandb import WandB

    monkeypatch.setenv("WANDB_MODE", mode)
    assert (WandB(TrackedRun(tmp_path, "0", 1.5, {})).server is not None) is sent


def test_a_damaged_record_of_trackers_is_refused(tmp_path: Path) -> None:
    for text in ("[]", '{"run": "../x", "began": 1.5}', '{"run": 3}', "{"):
        (tmp_path / "tracking.json").write_text(text)
        with pytest.raises(UsageError, match=r"tracking\.json.* (damaged|JSON)"):
            Tracking({"own": Book}, tmp_path, print).start(CONFIGURATION)


# --- names ---


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["tensorbord"], r"one of tensorboard, wandb, mlflow, or .*did you mean tensorboard\?"),
        (["mlflow", "mlflow"], r"tracking: must name each once, got mlflow more than once"),
        ("mlflow", r"tracking must be a list"),
    ],
)
def test_an_unknown_tracker_is_answered_with_the_known(names: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        config_from_dict({"tracking": names})


def test_a_missing_package_is_told_with_its_extra_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedclip.reports.trackers.mlflow import MLflow

    monkeypatch.setattr(MLflow, "packages", ("no_such_mlflow", "json"))
    with pytest.raises(UsageError, match=r"package no_such_mlflow, which .*extra mlflow: `pip"):
        fedclip.run({**CONFIG, "tracking": ["mlflow"]}, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_no_tracker_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("Own = dict\n")
    config = config_from_dict({"tracking": [f"{tmp_path / 'own.py'}:Own"]})
    with pytest.raises(UsageError, match=r"derived from fedclip\.reports\.trackers\.Tracker or"):
        tracker_classes(config)


# --- whole runs ---

OWN = """
import json
from pathlib import Path

import fedclip
from fedclip.reports.trackers import Tracker


class Lines(Tracker):
    def open(self):
        self.file = self.run.folder / "own.jsonl"
        return len(self.file.read_text().splitlines()) - 1 if self.file.exists() else -1

    def log(self, server_round, figures, at):
        with self.file.open("a") as file:
            file.write(json.dumps(dict(figures)) + "\\n")


class Enough(fedclip.Listener):
    def round(self, record):
        self.last = record["server_round"]

    def stop(self):
        return "enough" if self.last == 1 else None
"""


def numbers(folder: Path) -> list[dict[str, float]]:
    """What a run's files tell of each round."""
    lines = [(folder / f"{name}.jsonl").read_text().splitlines() for name in ("metrics", "timing")]
    return [figures_of(json.loads(a), json.loads(b)) for a, b in zip(*lines, strict=True)]


def test_a_tracker_and_a_listener_of_a_users_file(tmp_path: Path) -> None:
    """The listener ends the run after round 1; resumed without it, the run goes on to its end."""
    (tmp_path / "own.py").write_text(OWN)
    names = [f"{tmp_path / 'own.py'}:{name}" for name in ("Lines", "Enough")]
    folder = tmp_path / "run"
    run = fedclip.run({**CONFIG, "tracking": names}, output=folder)
    assert (run.summary["stopped_by"], run.summary["rounds"]) == ("enough", 1)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(f"- {names[1]}\n", ""))
    assert fedclip.resume(folder).summary["rounds"] == 3
    told = [json.loads(line) for line in (folder / "own.jsonl").read_text().splitlines()]
    assert told == numbers(folder)
    assert told[1]["clients/client-00/steps"] >= 1


PRIVATE = with_(
    model={"lora": {"r": 2, "lora_dropout": 0.0}},
    privacy={"unit": "client", "clip_norm": 0.1, "noise_multiplier": 1.0, "reproducible": True}
    | {"delta": 1e-3},
    evaluation={"keep_best": False},
)


def test_of_a_private_run_trackers_are_told_what_is_public(tmp_path: Path) -> None:
    pytest.importorskip("opacus", reason="opacus is not installed")
    (tmp_path / "own.py").write_text(OWN)
    tracker = [f"{tmp_path / 'own.py'}:Lines"]
    with pytest.warns(FedclipWarning):
        fedclip.run({**PRIVATE, "tracking": tracker}, output=tmp_path / "run")
    told = (tmp_path / "run" / "own.jsonl").read_text()
    assert "epsilon" in told
    assert "client" not in told
    assert '"loss"' not in told


@pytest.fixture
def killed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A run with some trackers that was stopped after round 1, then resumed; its folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def run(*names: str) -> Path:
        folder = tmp_path / "run"
        with pytest.raises(KeyboardInterrupt):
            fedclip.run({**CONFIG, "tracking": list(names)}, output=folder, listener=StopAfter(1))
        fedclip.resume(folder)
        return folder

    return run


def test_tensorboard_has_the_runs_numbers(killed_run: Any) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = killed_run("tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert found.setdefault(event.step, {}).setdefault(tag, event.value) == event.value
    expected = numbers(folder)
    assert sum(len(events.Scalars(tag)) for tag in events.Tags()["scalars"]) == sum(
        map(len, expected)
    )
    for number, figures in enumerate(expected):
        assert found[number] == pytest.approx(figures, rel=1e-6)  # 32 bits


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_mlflow_has_the_runs_numbers(killed_run: Any) -> None:
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    folder = killed_run("mlflow")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("fedclip").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["federation.rounds"] == "3"
    expected = numbers(folder)
    for name in {name for figures in expected for name in figures}:
        history = client.get_metric_history(run.info.run_id, name)
        found = [(metric.step, metric.value) for metric in history]
        assert sorted(found) == [(k, f[name]) for k, f in enumerate(expected) if name in f]


def test_wandb_has_the_runs_numbers_offline(killed_run: Any) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    folder = killed_run("wandb")
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found = list(wandb_history(file.read_bytes()))
    assert found == [
        (k, figures | {"server_round": k}) for k, figures in enumerate(numbers(folder))
    ]


def wandb_history(data: bytes) -> Iterator[tuple[int, dict[str, float]]]:
    """Steps and figures of W&B's file: records in blocks of 32 KB, as those of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record, whole = Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "history":
                items = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                yield (
                    record.history.step.num,
                    {k: v for k, v in items.items() if not k.startswith("_")},
                )


def test_a_tracked_run_knows_its_configuration(tmp_path: Path) -> None:
    tracker = Book(TrackedRun(tmp_path, "0" * 32, 1.5, {"seed": 0}))
    assert (tracker.place, tracker.server, tracker.answered) == (str(tmp_path), None, False)
