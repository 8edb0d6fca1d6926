"""What a person sees of a federation: a site's terminal, its status, what to do next."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedclip.config.loading import config_from_dict
from fedclip.deploy.flower import app_guard
from fedclip.deploy.flower.exit_reasons import explain
from fedclip.deploy.keys import certificates
from fedclip.deploy.keys import folder as keys
from fedclip.deploy.log.chain import LOG_FILE, Log, bodies
from fedclip.deploy.log.places import SITE_LOCK
from fedclip.deploy.log.status import status
from fedclip.deploy.log.words import Follower, in_words
from fedclip.deploy.messages.envelope import read_header
from fedclip.deploy.site import run as site_run
from fedclip.deploy.site.config import SiteConfig
from fedclip.deploy.site.run import run_site
from fedclip.errors import TrainingFailed, UsageError
from fedclip.experiment.lock import exclusive, is_held
from tests.conftest import Command
from tests.support.machines import NAMES, FakeMail, coordinate_here, trainer, tree, write_images


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation whose west refuses, and whose south is silent in round 2."""
    place = tmp_path_factory.mktemp("status")
    images = write_images(place / "images", dict.fromkeys(NAMES, 10))
    policy = {"approved": str(place / "none.json")}
    sites: dict[str, Callable[[bytes], bytes | None]] = {
        "north": trainer(images, place, "north").answer,
        "west": trainer(images, place, "west", policy=policy).answer,
    }
    south = trainer(images, place, "south")

    def silent_in_round_2(data: bytes) -> bytes | None:
        header = read_header(data)
        late = header["kind"] == "train" and header["round"] == 2
        return None if late else south.answer(data)

    sites["south"] = silent_in_round_2
    deploy = {"join_deadline": 0.5, "round_deadline": 2.0, "sites": list(NAMES), "quorum": 1}
    coordinate_here(config_from_dict(tree(images, deploy=deploy)), place / "run", FakeMail(sites))
    return place


def test_the_coordinators_status(place: Path, fedclip: Command) -> None:
    facts = status(place / "run")
    assert (facts["state"], facts["rounds_finished"]) == ("finished", 2)
    assert facts["last_event"].startswith("ended, ")
    rows = {row["site"]: row for row in facts["sites"]}
    assert (rows["north"]["last_round"], rows["north"]["times_left_out"]) == (2, 0)
    assert rows["north"]["tests"] == "1 of 2"
    assert (rows["south"]["last_round"], rows["south"]["times_left_out"]) == (1, 1)
    assert rows["south"]["last_trouble"] == "it has not answered"
    assert (rows["west"]["examples"], rows["west"]["last_heard"]) == (None, "never")
    assert "has approved no run yet" in rows["west"]["last_trouble"]
    code, output, _ = fedclip("status", place / "run")
    assert code == 0
    assert "finished" in output
    assert len(output.splitlines()) < 40
    code, output, _ = fedclip("status", place / "run", "--json")
    assert json.loads(output)["sites"][0]["site"] == "north"


def test_a_sites_status(place: Path, fedclip: Command) -> None:
    facts = status(place / "north")
    assert (facts["site"], facts["state"], facts["running"]) == ("north", "finished", False)
    assert facts["own_tests"] == "1 of 2"
    assert facts["adapter"] == str(place / "north/adapter")
    assert facts["agreed"].startswith("first job of the run")
    assert facts["sent_bytes"] > 1000
    assert status(place / "south")["state"] == "finished"
    refused = status(place / "west")
    assert (refused["state"], refused["run"], refused["loss"]) == ("no run yet", None, None)
    assert "approved no run" in refused["last_refusal"]
    code, output, _ = fedclip("status", place / "west")
    assert (code, "approved no run" in " ".join(output.split())) == (0, True)


def test_status_of_what_is_none(tmp_path: Path, place: Path, fedclip: Command) -> None:
    code, _, said = fedclip("status", tmp_path)
    assert (code, "holds no log" in said) == (2, True)
    (tmp_path / LOG_FILE).write_text('{"body": {"event": "sent"}}\n')
    code, _, said = fedclip("status", tmp_path)
    assert (code, "is damaged" in said) == (2, True)
    (tmp_path / LOG_FILE).write_text("x\n")
    code, _, said = fedclip("status", tmp_path)
    assert (code, "holds no line" in said) == (2, True)


def test_the_terminal_tells_what_happens(place: Path, tmp_path: Path) -> None:
    lines = [text for body in bodies(place / "north" / LOG_FILE) if (text := in_words(body))]
    assert lines[0].startswith("takes part in the run ")
    assert lines[0].endswith("2 rounds, 7 training examples here, no differential privacy")
    assert lines[1] == "round 1: training"
    assert lines[2].startswith("round 1: loss ")
    assert lines[2].endswith(" bytes sent")
    assert lines[-1] == (
        f"the run has ended: 1 of 2 test images here are recognised; the adapter is in "
        f"{place / 'north/adapter'}"
    )
    (refusal,) = [text for body in bodies(place / "west" / LOG_FILE) if (text := in_words(body))]
    assert refusal.startswith("refused: the site has approved no run yet; `fedclip site approve")
    private = {"event": "joined", "run": "r", "agreed": "a", "rounds": 1, "examples": 2}
    assert str(in_words({**private, "epsilon": 3.5})).endswith("epsilon 3.5")


def test_what_is_added_to_a_log_is_followed(tmp_path: Path) -> None:
    path = tmp_path / LOG_FILE
    follower = Follower(path)
    assert list(follower.news()) == []
    log = Log(path, certificates.new_key(), "north")
    log.add("x")
    assert [body["event"] for body in follower.news()] == ["opened", "x"]
    whole = path.read_bytes()
    log.add("y")
    with path.open("ab") as file:
        file.write(b'{"body": {"event": "z')
    assert [body["event"] for body in follower.news()] == ["y"]
    with path.open("ab") as file:
        file.write(b'"}}\nnonsense\n')
    assert [body["event"] for body in follower.news()] == ["z"]
    assert [body["event"] for body in Follower(path).news()] == []
    assert len(whole) > 100


def config(tmp_path: Path, **policy: Any) -> SiteConfig:
    images = write_images(tmp_path / "images", {"north": 10})
    values = {
        "name": "north",
        "state": str(tmp_path / "state"),
        "free_memory_gb": 0,
        "policy": policy,
    }
    return SiteConfig.model_validate({**values, "data": {"path": str(images / "sites/north")}})


def test_a_second_site_on_one_state_is_refused_at_once(tmp_path: Path) -> None:
    site = config(tmp_path)
    (tmp_path / "state").mkdir()
    with exclusive(tmp_path / "state" / SITE_LOCK, "taken"):
        assert is_held(tmp_path / "state" / SITE_LOCK)
        with pytest.raises(UsageError, match="another `fedclip site` works on"):
            run_site(site, lambda _: None)
    assert not is_held(tmp_path / "state" / SITE_LOCK)
    assert not is_held(tmp_path / "none")


class Kept:
    """Stands in for a supervised process; a job is refused when it is looked at."""

    def __init__(self, command: Any, log: Path, *_: Any, **__: Any) -> None:
        self.command, self.log, self.is_ready = command, log, True

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self, _: float) -> bool:
        return True

    def check(self) -> None:
        path = self.log.parent / LOG_FILE
        if not path.exists():
            Log(path, certificates.new_key(), "north").add("refused", run="r", reason="too long")


@pytest.mark.parametrize("when", ["end", "wait"])
def test_a_refused_site_ends_or_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(site_run, "Supervised", Kept)
    monkeypatch.setattr(site_run, "LOOK_EVERY", 0.01)
    said: list[str] = []
    stop = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if text == "refused: too long":
            stop.set()

    site = config(tmp_path, when_refused=when)
    if when == "end":
        with pytest.raises(UsageError, match=r"when_refused: end\): too long") as end:
            run_site(site, say, threading.Event())
        assert end.value.exit_code == 2
    else:
        run_site(site, say, stop)
    assert said[-2:] == ["site north has joined", "refused: too long"]


def test_code_that_was_not_agreed_to_stands_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(app_guard.RECORD, str(tmp_path / "app.json"))
    monkeypatch.setenv(app_guard.NAME, "north")
    assert not app_guard.admits(b"no bundle")
    (opened, refused) = bodies(tmp_path / LOG_FILE)
    assert opened["who"] == "north"
    assert refused["reason"].startswith("the coordinator sends code that this site has not agreed")
    assert not (tmp_path / "app.json").exists()


def test_what_to_do_next_can_be_typed_as_it_stands(tmp_path: Path, fedclip: Command) -> None:
    folder, name = tmp_path / "my keys", "St. Mary's (A)"
    keys.init(folder, ["localhost"])
    facts = keys.site(folder, name)
    assert facts["next"].startswith(f"copy {keys.site_folder(folder, name)} to the site")
    words = shell_words(facts["if_it_runs_already"])
    assert words == ["fedclip", "keys", "register", name, "--keys", str(folder)]
    code, _, said = fedclip(*words[1:], "--coordinator", "127.0.0.1:9")
    assert code != 0
    assert "does not answer" in said  # understood, but nobody is there
    readme = (keys.site_folder(folder, name) / "README.txt").read_text()
    assert f"`name: {name}`" in readme
    log = "Exit Code: 305\nfailed to activate SuperNode"
    hint = explain(f"site {name}", 1, log).message.split("`")[1]
    assert shell_words(hint)[1:] == ["keys", "register", name]


def shell_words(text: str) -> list[str]:
    import shlex

    return shlex.split(text)


def test_a_coordinator_that_nobody_joins_has_a_status(place: Path, tmp_path: Path) -> None:
    deploy = {"join_deadline": 0.1, "sites": list(NAMES)}
    values = tree(place / "images", deploy=deploy)
    with pytest.raises(TrainingFailed):
        coordinate_here(config_from_dict(values), tmp_path / "run", FakeMail({}))
    facts = status(tmp_path / "run")
    assert (facts["state"], facts["adapter"]) == ("waiting for sites", None)
    assert [row["last_heard"] for row in facts["sites"]] == ["never"] * 3
