"""Sites of masked sums without models: each adds a number to all that it is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedclip.deploy.keys import folder as keys
from fedclip.deploy.keys.peers import all_peers, verifier
from fedclip.deploy.messages import masks, replies, requests
from fedclip.deploy.messages.envelope import BadMessage, Envelope
from fedclip.deploy.messages.requests import HELLO, TRAIN, Ticket
from fedclip.deploy.remote.engine import Formats
from fedclip.deploy.remote.last_sum import LastSum
from fedclip.deploy.remote.masked import MaskedRemoteEngine, MaskPlan
from fedclip.deploy.remote.roster import Patience, Roster
from fedclip.deploy.site.config import SiteConfig
from fedclip.deploy.site.masking import SiteMasks
from fedclip.deploy.site.policy import Against
from fedclip.federated.secure.session import Broken
from fedclip.records import ClientReport, ClientUpdate, TrainRequest
from tests.support.machines import FakeMail

STATE = {"w": torch.arange(6.0) / 10}
JOB: dict[str, Any] = {"secure": {"aggregation": "masked"}}
EXAMPLES = {"east": 10, "north": 20, "south": 30, "west": 40}


class LightSite:
    """Answers as a trainer does; `moved` is what it adds."""

    def __init__(self, name: str, key_folder: Path, state: Path, moved: float, **config: Any):
        own = {"name": name, "keys": str(keys.site_folder(key_folder, name))}
        self.name, self.moved = name, moved
        self.config = SiteConfig.model_validate({**own, "state": str(state / name), **config})
        self.masks = SiteMasks(self.config)

    def __call__(self, data: bytes) -> bytes:
        ticket, site = None, self.name
        try:
            envelope = Envelope.unpack(data)
            ticket = Ticket.of(envelope.header)
            if envelope.kind == HELLO:
                return replies.ready(ticket, site, EXAMPLES[site], {})
            if envelope.kind == TRAIN:
                return self.train(envelope, ticket)
            return self.masks.step(envelope, ticket, JOB)
        except (Against, BadMessage, Broken) as error:
            return replies.refusal(ticket, site, "refused", str(error))

    def train(self, envelope: Envelope, ticket: Ticket) -> bytes:
        request, exchange, _ = requests.read_train(envelope, self.name)
        asked = self.masks.asked(envelope, ticket, JOB, request)
        report = ClientReport(self.name, EXAMPLES[self.name], 0.5, 1, 0.1)
        update = ClientUpdate(report, {n: t + self.moved for n, t in request.state.items()})
        vector = self.masks.masked(asked, masks.binding(envelope), JOB, exchange, update)
        return masks.masked(ticket, report, *vector)


def light_sites(
    key_folder: Path, state: Path, **config: Any
) -> dict[str, Callable[[bytes], bytes | None]]:
    """Four sites, whose mean by examples moves by 0.3."""
    moved = {"east": 0.1, "north": 0.2, "south": 0.3, "west": 0.4}
    return {name: LightSite(name, key_folder, state, by, **config) for name, by in moved.items()}


def masked_engine(
    key_folder: Path, mail: FakeMail, attempts: int = 1, last: Path | None = None, **plan: Any
) -> tuple[MaskedRemoteEngine, list[str]]:
    """An engine that has greeted the sites, and what it says."""
    said: list[str] = []
    roster = Roster(mail, "run", JOB, "base", 10**7, said.append, frozenset(mail.sites))
    roster.greet(0.0, lambda: True)
    engine = MaskedRemoteEngine(
        mail, roster, Patience(0.5, deadline=0.05, attempts=attempts, look=0.01), Formats(),
        say=said.append,
        plan=MaskPlan(verifier(all_peers(key_folder)), 3, 1.0, **plan), last=LastSum(last),
    )  # fmt: skip
    return engine, said


def ask(server_round: int = 1, names: tuple[str, ...] = tuple(EXAMPLES)) -> TrainRequest:
    """The round's request to all four."""
    return TrainRequest(server_round, names, STATE, examples=EXAMPLES)
