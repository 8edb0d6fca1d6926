"""Signed logs: whole, mended after a kill, and held against each other."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.consent_log import missed
from fedclip.config.loading import config_from_dict
from fedclip.deploy.keys import certificates
from fedclip.deploy.keys import folder as keys
from fedclip.deploy.log.chain import (
    FIRST,
    KEY,
    LOG_FILE,
    MENDED,
    OPENED,
    OWN_KEY,
    Log,
    bodies,
    canonical,
    line_digest,
    log_key,
)
from fedclip.deploy.log.verify import compare, read_log, told, verify_folders
from fedclip.deploy.messages.envelope import BadMessage, Envelope
from fedclip.deploy.messages.heads import Head
from fedclip.deploy.messages.requests import Ticket
from fedclip.errors import FedclipError, UsageError
from tests.conftest import Command
from tests.support.machines import NAMES, FakeMail, coordinate_here, trainer, tree, write_images

KEY_OF = certificates.new_key()


def log_at(place: Path, who: str = "north", run: str | None = None, key: Any = KEY_OF) -> Log:
    return Log(place / LOG_FILE, key, who, run, now=lambda: 1000.123456)


def test_a_line_has_the_digest_of_the_one_before_and_a_signature(tmp_path: Path) -> None:
    log = log_at(tmp_path)
    head = log.add("joined", run="r", examples=7, epsilon=float("inf"))
    lines = (tmp_path / LOG_FILE).read_bytes().splitlines()
    first, second = (json.loads(line)["body"] for line in lines)
    assert (first["n"], first["event"], first["who"], first["prev"]) == (1, OPENED, "north", FIRST)
    assert second["prev"] == line_digest(lines[0])
    assert (second["examples"], second["epsilon"], second["time"]) == (7, None, 1000.123)
    assert head == Head(2, line_digest(lines[1])) == log.head
    signature = base64.b64decode(json.loads(lines[1])["sig"])
    assert certificates.signed_by(first["key"], canonical(second), signature)
    assert not certificates.signed_by(first["key"], canonical(first), signature)
    found = read_log(tmp_path / LOG_FILE)
    assert found.bodies == [first, second]
    assert told(found)["confirmed"] == "0 confirmed by nobody here"
    assert told(found)["note"].startswith("a cut end would not be seen")


def test_two_processes_write_one_chain(tmp_path: Path) -> None:
    one, other = log_at(tmp_path), log_at(tmp_path)
    for number in range(6):
        (one if number % 2 else other).add("x", number=number)
    assert other.head.n == 7
    assert [b.get("number") for b in read_log(tmp_path / LOG_FILE).bodies] == [None, *range(6)]


@pytest.mark.parametrize("cut", [1, 40, 10_000], ids=["newline", "half", "all but the first"])
def test_a_half_written_line_is_mended_and_recorded(tmp_path: Path, cut: int) -> None:
    log_at(tmp_path).add("x")
    path = tmp_path / LOG_FILE
    data = path.read_bytes()
    start = data.index(b"\n") + 1
    path.write_bytes(data[: max(start + 1, len(data) - cut)])
    again = log_at(tmp_path)
    again.add("y")
    events = [(b["event"], b.get("bytes")) for b in read_log(path).bodies]
    left = max(1, len(data) - cut - start)
    assert events == [(OPENED, None), (MENDED, left), ("y", None)]


def test_a_killed_writer_leaves_a_log_that_goes_on(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from fedclip.deploy.log.chain import *\n"
        "log = Log(Path(sys.argv[1]), log_key(None, '', Path(sys.argv[1]).parent), 'north')\n"
        "while True: print(log.add('x', text='y' * 3000).n, flush=True)\n"
    )
    path, reached = tmp_path / LOG_FILE, 0
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(5):
            reached = int(process.stdout.readline())
        process.kill()
        process.stdout.close()
        process.wait()
        assert len(read_log(path).bodies) >= reached


def test_a_log_that_is_damaged_is_not_gone_on_with(tmp_path: Path) -> None:
    for text in ("\n", "x\n", '{"body": {}}\n', '{"body": {"n": "x"}, "sig": ""}\n', "[]\n"):
        (tmp_path / LOG_FILE).write_text(text)
        with pytest.raises(UsageError, match="is damaged"):
            log_at(tmp_path).add("x")
    with pytest.raises(FedclipError, match="cannot be written"):
        Log(tmp_path / LOG_FILE / "no folder", KEY_OF, "x").add("y")


def test_a_new_key_stands_in_the_log_and_can_be_compared(tmp_path: Path) -> None:
    folder, state = tmp_path / "keys", tmp_path / "state"
    keys.init(folder, ["localhost"])
    keys.site(folder, "north")
    state.mkdir()
    own = log_key(folder / "sites/north", keys.SITE_KEY, state)
    log_at(state, key=own).add("x")
    assert verify_folders([state], folder)[0]["lines"] == 2
    log_at(state, key=log_key(None, "", state)).add("x")
    assert (state / OWN_KEY).stat().st_mode & 0o77 == 0
    assert [b["event"] for b in bodies(state / LOG_FILE)] == [OPENED, "x", KEY, "x"]
    (row,) = verify_folders([state])
    assert len(row["keys"].split(", ")) == 2
    with pytest.raises(UsageError, match="not the key of north"):
        verify_folders([state], folder)


def test_heads_that_cannot_be() -> None:
    good = {"n": 1, "sha256": "0" * 64}
    assert Head.of({"log": good}) == Head(1, "0" * 64)
    assert Head.of({}) is Head.of({"log": None}) is None
    for change in ({"n": 0}, {"n": True}, {"n": 1.0}, {"n": 10**400}, {"sha256": "0" * 63},
                   {"sha256": "G" * 64}, {"sha256": None}, {"x": 1}):  # fmt: skip
        with pytest.raises(BadMessage, match="the head of its log"):
            Head.of({"log": {**good, **change}})
    for bad in (1, "x", [1, 2], {"n": 1}):
        with pytest.raises(BadMessage):
            Head.of({"log": bad})


# --- a federation's logs ---


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder and the states of a short federation."""
    place = tmp_path_factory.mktemp("logs")
    images = write_images(place / "images", dict.fromkeys(NAMES, 10))
    mail = FakeMail({name: trainer(images, place, name).answer for name in NAMES})
    coordinate_here(
        config_from_dict(tree(images, deploy={"join_deadline": 1.0})), place / "run", mail
    )
    assert all("log" in Envelope.unpack(data).header for _, data in mail.sent + mail.received)
    return place


def test_the_logs_of_four_nodes_agree(logs: Path) -> None:
    rows = verify_folders([logs / "run", *(logs / name for name in NAMES)])
    for row in rows:
        assert row["note"] == "nothing is missing", row
    coordinator = read_log(logs / "run/deploy" / LOG_FILE)
    events = [body["event"] for body in coordinator.bodies]
    assert events[:2] == [OPENED, "started"]
    assert events.count("joined") == events.count("tested") == 3
    assert (events.count("round"), events.count("answered"), events[-1]) == (2, 6, "ended")
    own = [body["event"] for body in bodies(logs / "north" / LOG_FILE)]
    assert own == [OPENED, "joined", "asked", "sent", "asked", "sent", "ended"]


def test_one_log_alone_is_verified_up_to_where_others_confirm_it(
    logs: Path, tmp_path: Path, fedclip: Command
) -> None:
    alone = verify_folders([logs / "north" / LOG_FILE])
    assert alone[0]["confirmed"] == "7 confirmed by the adapter's seal"
    path = tmp_path / LOG_FILE
    path.write_bytes((logs / "north" / LOG_FILE).read_bytes())
    assert verify_folders([path])[0]["confirmed"] == "0 confirmed by nobody here"
    assert "would not be seen" in verify_folders([path])[0]["note"]
    two = verify_folders([logs / "north", logs / "run", logs / "run"])
    assert len(two) == 2
    assert re.fullmatch(r"\d+ confirmed by north, the adapter's seal", two[1]["confirmed"])
    code, output, _ = fedclip("log", "verify", logs / "north", logs / "run")
    assert code == 0
    assert "nothing is missing" in output


def test_every_mutation_is_found(logs: Path) -> None:
    """A sample; `python -m benchmarks.consent_log` tries a thousand."""
    tried, not_found = missed([logs / "run", *(logs / name for name in NAMES)], 60)
    assert not any(not_found.values()), not_found
    assert set(tried.values()) == {12}


@pytest.mark.parametrize("kind", ["hello", "train", "result", "nonsense"])
def test_a_refusal_carries_the_sites_head_not_the_coordinators(
    logs: Path, tmp_path: Path, kind: str
) -> None:
    ticket = Ticket("r", "j", 1, "n", "b", Head(99, "9" * 64))
    site = trainer(logs / "images", tmp_path, "north")
    header = {"kind": kind, "site": "north", **ticket.header()}
    for _ in range(2):  # the same again is no event of its own
        answer = Envelope.unpack(site.answer(Envelope(header).pack()))
        assert answer.kind == "refusal"
        head = Head.of(answer.header)
        digests = read_log(tmp_path / "north" / LOG_FILE).digests
        assert head == Head(len(digests), digests[-1])
        assert len(digests) <= 2


def rewritten(data: bytes, key: Any, change: Mapping[int, Mapping[str, Any]]) -> bytes:
    """A log with changed lines, chained and signed anew by another key."""
    lines, previous = [], FIRST
    for number, line in enumerate(data.splitlines(), start=1):
        body = json.loads(line)["body"] | {"prev": previous} | change.get(number, {})
        if body["event"] == OPENED:
            body["key"] = certificates.public_openssh(key.public_key(), "").decode().strip()
        signature = base64.b64encode(certificates.sign(key, canonical(body))).decode()
        lines.append(canonical({"body": body, "sig": signature}))
        previous = line_digest(lines[-1])
    return b"\n".join(lines) + b"\n"


def test_a_log_that_its_own_node_rewrites_does_not_fit_the_others(
    logs: Path, tmp_path: Path
) -> None:
    own = logs / "north" / LOG_FILE
    (tmp_path / LOG_FILE).write_bytes(rewritten(own.read_bytes(), KEY_OF, {2: {"examples": 999}}))
    assert verify_folders([tmp_path])[0]["lines"] == 7  # alone it holds
    with pytest.raises(UsageError, match="it was rewritten"):
        verify_folders([tmp_path, logs / "run"])


def test_a_message_that_nobody_sent_is_named(tmp_path: Path) -> None:
    north = log_at(tmp_path / "north")
    coordinator = log_at(tmp_path / "run", "coordinator", "r1")
    coordinator.add("answered", site="north", received="5" * 64, **north.head.header())
    with pytest.raises(UsageError, match=r"a message has come from north that .* does not tell of"):
        compare([read_log(log.path) for log in (north, coordinator)])
    with pytest.raises(UsageError, match="are both logs of north"):
        verify_folders([north.path, log_at(tmp_path / "again").add("x") and tmp_path / "again"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: d[d.index(b"\n") + 1 :], "the log's beginning is missing"),
        (lambda d: b"", "holds no line of a log"),
        (lambda d: d.replace(b"north", b"south", 1), "was changed"),
        (lambda d: d.replace(b"{", b"{ ", 1), "not in the form"),
        (lambda d: d.replace(b'"sig":"', b'"sig":"*', 1), "its signature cannot be read"),
        (lambda d: d.replace(b"}", b"", 1), "damaged"),
        (lambda d: b"\xff" + d, "damaged"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    tmp_path: Path, fedclip: Command, change: Any, why: str
) -> None:
    log = log_at(tmp_path)
    log.add("x")
    log.path.write_bytes(change(log.path.read_bytes()))
    code, _, said = fedclip("log", "verify", tmp_path)
    assert code == 2
    assert why in said


def test_a_folder_without_a_log_is_named(tmp_path: Path, fedclip: Command) -> None:
    code, _, said = fedclip("log", "verify", tmp_path)
    assert code == 2
    assert "holds no log" in said
