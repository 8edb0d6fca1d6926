"""Mail over Flower's grid: nobody waits for a reply that does not come to its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedclip.deploy.flower.mail import FlowerMail
from fedclip.deploy.flower.record import bytes_of, record_of
from fedclip.deploy.remote.roster import Answer


class Grid:
    """Pulls a ticket as it is told: a reply, nothing, an error, or a wait until `open` is set."""

    def __init__(self, replies: dict[str, Any]) -> None:
        self.replies = replies
        self.open = threading.Event()
        self.pulled: list[str] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.sent = list(messages)
        return [f"to-{m.metadata.dst_node_id}" if m.metadata.dst_node_id else "" for m in self.sent]

    def pull_messages(self, tickets: Iterable[str]) -> Iterable[Message]:
        (ticket,) = tickets
        self.pulled.append(ticket)
        reply = self.replies[ticket]
        if isinstance(reply, str):
            self.open.wait(20)
            reply = b"late"
        if isinstance(reply, Exception):
            raise reply
        return [] if reply is None else [answer(ticket, reply)]


def answer(ticket: str, content: bytes | Error) -> Message:
    asked = Message(RecordDict(), dst_node_id=1, message_type="train")
    asked.metadata.__dict__["_message_id"] = ticket
    return Message(record_of(content) if isinstance(content, bytes) else content, reply_to=asked)


@pytest.fixture(autouse=True)
def as_in_a_process_of_flowers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def test_what_is_there_comes_and_the_rest_is_asked_for_again() -> None:
    grid = Grid({"a": b"one", "b": None})
    mail = FlowerMail(grid, 60)  # type: ignore[arg-type]
    assert list(mail.collect(["a", "b"])) == [Answer("a", b"one")]
    grid.replies["b"] = b"two"
    assert list(mail.collect(["b"])) == [Answer("b", b"two")]
    assert grid.pulled == ["a", "b", "b"]


def test_a_reply_that_is_stuck_keeps_nobody_waiting() -> None:
    grid = Grid({"a": "stuck", "b": b"two"})
    mail = FlowerMail(grid, 60)  # type: ignore[arg-type]
    start = time.monotonic()
    assert list(mail.collect(["a", "b"])) == [Answer("b", b"two")]
    for _ in range(3):
        assert list(mail.collect(["a"])) == []
    assert time.monotonic() - start < 50  # the reply is stuck for ever
    assert grid.pulled.count("a") == 1  # one that is asked for already
    grid.open.set()
    end = time.monotonic() + 60
    while not (got := list(mail.collect(["a"]))):
        assert time.monotonic() < end
    assert got == [Answer("a", b"late")]


def test_a_ticket_that_is_forgotten_is_let_go() -> None:
    grid = Grid({"a": "stuck"})
    mail = FlowerMail(grid, 60)  # type: ignore[arg-type]
    assert list(mail.collect(["a"])) == []
    mail.forget(["a", "never seen"])
    assert mail._pulls == {}
    grid.open.set()


def test_errors_of_flower_are_answers_and_those_of_the_line_are_raised() -> None:
    grid = Grid({"a": Error(3, "no more"), "b": ConnectionError("gone")})
    mail = FlowerMail(grid, 60)  # type: ignore[arg-type]
    assert list(mail.collect(["a"])) == [Answer("a", None, "Flower's error 3: no more")]
    with pytest.raises(ConnectionError, match="gone"):
        list(mail.collect(["b"]))


def test_letters_and_those_that_flower_does_not_take() -> None:
    grid = Grid({"to-5": b"yes"})
    mail = FlowerMail(grid, 60)  # type: ignore[arg-type]
    tickets = mail.post([(5, b"hello"), (0, b"nobody")])
    assert tickets == ["to-5", "not sent to 0"]
    assert list(mail.collect(tickets)) == [
        Answer("not sent to 0", None, "Flower did not take the message"),
        Answer("to-5", b"yes"),
    ]
    (last,) = grid.sent
    assert bytes_of(last.content) == b"nobody"
    assert last.metadata.ttl == 60
