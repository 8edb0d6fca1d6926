"""What a coordinator's log tells of a run: who joined, was asked, answered, or was left out."""

from __future__ import annotations

from typing import Any

from fedclip.deploy.log.chain import Log, message_facts
from fedclip.deploy.messages.envelope import BadMessage, read_header
from fedclip.deploy.messages.heads import Head
from fedclip.deploy.messages.results import Tested
from fedclip.errors import one_line
from fedclip.models.state import adapter_sha256
from fedclip.records import ClientReport, LeftOut, TrainRequest


class Journal:
    """Writes a coordinator's log; nothing where there is none, as in a test of the engine alone."""

    def __init__(self, log: Log | None = None) -> None:
        self._log = log

    @property
    def head(self) -> Head | None:
        """The head that the next message carries."""
        return None if self._log is None else self._log.head

    def note(self, event: str, **facts: Any) -> Head | None:
        """Any other event; gives the head after it."""
        return None if self._log is None else self._log.add(event, **facts)

    def joined(self, site: str, examples: int, answer: bytes | None) -> None:
        """A site has taken up the job."""
        self.note("joined", site=site, examples=examples, **_head_in(answer))

    def refused(self, site: str, reason: str, answer: bytes | None) -> None:
        """A site may not join, or will not."""
        self.note("refused", site=site, reason=one_line(reason), **_head_in(answer))

    def round(self, request: TrainRequest) -> None:
        """A round begins, from a state with this digest."""
        if self._log is not None:
            state = adapter_sha256(request.state)
            facts = {"round": request.server_round, "purpose": request.purpose}
            self.note("round", **facts, state=state)

    def asked(self, site: str, server_round: int, kind: str, data: bytes) -> None:
        """A message is about to be sent."""
        facts = {"site": site, "round": server_round, "kind": kind}
        self.note("asked", **facts, **message_facts("sent", data))

    def answered(self, report: ClientReport, server_round: int, data: bytes) -> None:
        """A site's update has been taken."""
        facts = {"site": report.client_id, "round": server_round, "examples": report.num_examples}
        self.note("answered", **facts, **message_facts("received", data), **_head_in(data))

    def left_out(self, server_round: int, one: LeftOut, answer: bytes | None = None) -> None:
        """The round does without a site."""
        facts = {"site": one.client_id, "round": server_round, "kind": one.kind}
        self.note("left_out", **facts, reason=one_line(one.reason), **_head_in(answer))

    def tested(self, site: str, found: Tested, data: bytes) -> None:
        """A site has the result, and has told its tests."""
        facts = {"site": site, "tests": found.tests, "correct": found.correct}
        self.note("tested", **facts, **_head_in(data))


def _head_in(answer: bytes | None) -> dict[str, Any]:
    """The head of a site's log that came with its answer, as it is entered here."""
    try:
        head = None if answer is None else Head.of(read_header(answer))
    except BadMessage:  # an answer that was refused for it
        return {}
    return {} if head is None else head.header()
