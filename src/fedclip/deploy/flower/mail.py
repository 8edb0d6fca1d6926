"""Mail over Flower: bytes in an array of a record, carried by its Grid.

Flower 1.41 is the version that this is written for. Its own loops poll every three seconds and
count rounds from 1; here the Grid's pushing and pulling are used as they are.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flwr.app import Message

from fedclip.deploy.flower.record import bytes_of, record_of
from fedclip.deploy.remote.roster import Answer

if TYPE_CHECKING:
    from flwr.serverapp import Grid

KIND = "train"
"""Flower's type of all messages; what they ask for is in their header."""

A_MOMENT = 0.2
"""Seconds in which Flower answers whether there is a reply."""


class FlowerMail:
    """Sends and fetches bytes by a Grid; `ttl` is how many seconds a message is good for.

    Flower announces a reply before its bytes have been sent, and then waits for them, up to three
    minutes after the sender was killed. So each ticket is pulled in a thread of its own, and a
    reply that does not come to its end keeps nobody waiting.
    """

    def __init__(self, grid: Grid, ttl: float) -> None:
        self._grid = grid
        self._ttl = ttl
        self._pulls: dict[str, _Pull] = {}

    def online(self) -> Mapping[int, str]:
        """Nodes that are there, with the name that each one's key is registered for."""
        nodes: Iterable[Any] = self._grid.get_nodes()
        return {node.node_id: node.name for node in nodes}

    def post(self, letters: Sequence[tuple[int, bytes]]) -> Sequence[str]:
        """Sends bytes to nodes, one message each, as several may be too many bytes at once."""
        tickets = []
        for node, data in letters:
            message = Message(record_of(data), node, KIND, ttl=self._ttl)
            ids = [i for i in self._grid.push_messages([message]) if i]
            tickets.append(ids[0] if ids else f"not sent to {node}")
        return tickets

    def collect(self, tickets: Sequence[str]) -> Iterable[Answer]:
        """Answers and errors that have come for these tickets."""
        for ticket in tickets:
            if ticket.startswith("not sent"):
                yield Answer(ticket, None, "Flower did not take the message")
        waited = [ticket for ticket in tickets if not ticket.startswith("not sent")]
        for ticket in waited:
            if ticket not in self._pulls:
                self._pulls[ticket] = _Pull(self._grid, ticket)
        end = time.monotonic() + A_MOMENT
        for ticket in waited:
            pull = self._pulls[ticket]
            pull.join(max(end - time.monotonic(), 0.0))
            if not pull.is_alive():
                del self._pulls[ticket]
                yield from map(_answer, pull.result())

    def forget(self, tickets: Sequence[str]) -> None:
        """Stop waiting for these replies; Flower drops the expired ones."""
        for ticket in tickets:
            self._pulls.pop(ticket, None)


class _Pull(threading.Thread):
    """Asks once for the reply to a message, and waits for its bytes if there is one."""

    def __init__(self, grid: Grid, ticket: str) -> None:
        super().__init__(daemon=True)  # a process may end while one waits
        self._grid, self._ticket = grid, ticket
        self._messages: list[Message] = []
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._messages = list(self._grid.pull_messages([self._ticket]))
        except Exception as error:
            self._error = error

    def result(self) -> list[Message]:
        if self._error is not None:
            raise self._error
        return self._messages


def _answer(message: Message) -> Answer:
    ticket = message.metadata.reply_to_message_id
    if message.has_error():
        error = message.error
        return Answer(ticket, None, f"Flower's error {error.code}: {error.reason}")
    try:
        return Answer(ticket, bytes_of(message.content))
    except Exception:  # whatever a site has put there: it alone is left out
        return Answer(ticket, None, "its answer is none of fedclip's")
