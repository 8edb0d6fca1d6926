"""Mail over Flower: bytes in an array of a record, carried by its Grid.

Flower 1.41 is the version that this is written for. Its own loops poll every three seconds and
count rounds from 1; here the Grid's pushing and pulling are used as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flwr.app import Message

from fedclip.engines.flower_record import bytes_of, record_of
from fedclip.engines.roster import Answer

if TYPE_CHECKING:
    from flwr.serverapp import Grid

KIND = "train"
"""Flower's type of all messages; what they ask for is in their header."""


class FlowerMail:
    """Sends and fetches bytes by a Grid; `ttl` is how many seconds a message is good for."""

    def __init__(self, grid: Grid, ttl: float) -> None:
        self._grid = grid
        self._ttl = ttl

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
        for message in self._grid.pull_messages(waited) if waited else ():
            yield _answer(message)

    def forget(self, tickets: Sequence[str]) -> None:
        """Nothing to do: Flower drops messages when they are no longer good."""


def _answer(message: Message) -> Answer:
    ticket = message.metadata.reply_to_message_id
    if message.has_error():
        error = message.error
        return Answer(ticket, None, f"Flower's error {error.code}: {error.reason}")
    try:
        return Answer(ticket, bytes_of(message.content))
    except KeyError:
        return Answer(ticket, None, "its answer is none of fedclip's")
