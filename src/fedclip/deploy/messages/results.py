"""The end of a run: every site is given what came out, and says how well it does there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedclip.deploy.messages.envelope import BadMessage, Envelope
from fedclip.deploy.messages.replies import TESTED, Refused, check_answer, read_numbers
from fedclip.deploy.messages.requests import RESULT, Ticket
from fedclip.models.state import adapter_sha256
from fedclip.records import RunState

if TYPE_CHECKING:
    import torch

_RANK = "rank/"
STATEMENT = "statement"
"""The key of a result's header under which the signed statement stands."""


@dataclass(frozen=True)
class Tested:
    """A site's local test set size, and its model's correct predictions; 0 of 0 if withheld."""

    tests: int = 0
    correct: int = 0


def result(
    state: RunState, site: str, ticket: Ticket, signed: Mapping[str, Any] | None = None
) -> bytes:
    """What a run ended with, for one site: the shared tensors and what belongs to them.

    `signed` is the coordinator's statement about it (`deploy.log.statement`).
    """
    header = {"kind": RESULT, "site": site, **ticket.header(), STATEMENT: signed}
    return Envelope(header, _sent(state)).pack()


def state_digest(state: RunState) -> str:
    """Digest of what a site is sent at the end."""
    return adapter_sha256(_sent(state))


def _sent(state: RunState) -> dict[str, torch.Tensor]:
    ranks = {name: t for name, t in state.server.items() if name.startswith(_RANK)}
    return RunState(state.shared, shift=state.shift, server=ranks).laid_out().flat()


def read_result(envelope: Envelope) -> RunState:
    """The state in a message; raises BadMessage where there is none."""
    try:
        return RunState.from_flat(envelope.tensors)
    except KeyError as error:
        raise BadMessage(f"the result holds something unknown: {error}") from None


def tested(ticket: Ticket, site: str, found: Tested) -> bytes:
    """A site's answer to a result."""
    header = {"kind": TESTED, "site": site, **ticket.header()}
    return Envelope(header | {"tests": found.tests, "correct": found.correct}).pack()


def read_tested(data: bytes, ticket: Ticket, site: str, largest: int) -> Tested:
    """What a site says of its tests; raises Refused, naming the site."""
    header = check_answer(data, TESTED, ticket, site, largest).header
    found = Tested(**read_numbers(header, site, ("tests", "correct")))
    if found.correct > found.tests:
        raise Refused(f"{site} says that {found.correct} of {found.tests} tests are right")
    return found
