"""Track available sites: handshake, liveness, transport protocol."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from fedclip.config.names import is_twin
from fedclip.deploy.messages import replies, requests
from fedclip.deploy.messages.replies import Refused, believed
from fedclip.deploy.messages.requests import Ticket
from fedclip.deploy.remote.journal import Journal
from fedclip.federated.update_checks import Reason
from fedclip.federated.updates import Quorum

GREETING = 30.0
"""Seconds for which a round waits for a site that is being greeted, if there are enough others."""
GREET_AGAIN = 60.0
"""Seconds after which one that was refused may have changed."""

MOST_OF_ALL = 0.9
"""Share of all examples from which on a site is told to be most of the run."""


class Answer(NamedTuple):
    """What came back under a ticket: bytes, or None and what went wrong on the way."""

    ticket: str
    data: bytes | None
    error: str = ""


class Mail(Protocol):
    """Carries bytes to nodes and back."""

    def online(self) -> Mapping[int, str]:
        """Nodes that are there, with the name that each one's key is registered for, or ''."""
        ...

    def post(self, letters: Sequence[tuple[int, bytes]]) -> Sequence[str]:
        """Sends bytes to nodes; gives a ticket for each."""
        ...

    def collect(self, tickets: Sequence[str]) -> Iterable[Answer]:
        """What has come for these tickets since; never waits."""
        ...

    def forget(self, tickets: Sequence[str]) -> None:
        """Answers to these are not wanted any more."""
        ...


@dataclass(frozen=True)
class Patience(Quorum):
    """How long to wait, in seconds, and for how many; `attempts` how often a round is tried."""

    share: float = 0.5
    deadline: float = 3600.0
    attempts: int = 3
    look: float = 0.5


@dataclass
class Roster:
    """The sites that have been told what the run is about.

    `nodes` and `examples` are by site name, 0 for a site that has not come yet; `wanted` are the
    names that may take part, None all. `on_admit` is called when a site has come. Every
    ticket carries the head of the coordinator's log.
    """

    mail: Mail
    run: str
    job: Mapping[str, Any]
    base: str
    largest: int
    say: Callable[[str], None]
    wanted: frozenset[str] | None = None
    examples: dict[str, int] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)
    on_admit: Callable[[], None] = lambda: None
    look: float = 0.5
    journal: Journal = field(default_factory=Journal)
    refusals: dict[str, Refused] = field(default_factory=dict)  # why a site may not join, by name
    _known: dict[int, str] = field(default_factory=dict)  # greeted nodes
    _pending: dict[str, tuple[int, str, Ticket]] = field(default_factory=dict)  # by mail's ticket
    _asked: dict[int, float] = field(default_factory=dict)  # when a node was greeted
    _refused: dict[int, float] = field(default_factory=dict)  # when it was refused
    _told: set[str] = field(default_factory=set)

    def ticket(self, server_round: int, nonce: str) -> Ticket:
        """A ticket of this run."""
        job, head = requests.job_digest(self.job), self.journal.head
        return Ticket(self.run, job, server_round, nonce, self.base, head)

    def forget(self, site: str) -> None:
        """The site will be greeted again."""
        node = self.nodes.pop(site, None)
        if node is not None:
            self._known.pop(node, None)

    def greet(self, until: float, enough: Callable[[], bool]) -> None:
        """Greets all who are new; waits until there are enough or the clock says `until`.

        Those who are there but slow to answer are heard at the next call.
        """
        while True:
            online = dict(self.mail.online())
            for site, node in list(self.nodes.items()):
                if node not in online:
                    self.forget(site)
            self._post(online)
            self._hear()
            if enough() and not self._fresh():
                return
            if time.monotonic() >= until:
                return
            time.sleep(self.look)

    def _fresh(self) -> bool:
        """Whether somebody was greeted a short time ago and has not answered yet."""
        now = time.monotonic()
        return any(now - self._asked[node] < GREETING for node, _, _ in self._pending.values())

    def _post(self, online: Mapping[int, str]) -> None:
        busy = {node for node, _, _ in self._pending.values()}
        now = time.monotonic()
        letters: list[tuple[int, bytes]] = []
        facts = []
        for node, name in sorted(online.items()):
            again = now - self._refused.get(node, -math.inf) >= GREET_AGAIN
            if node in self._known or node in busy or not again:
                continue
            if self.wanted is not None and name and name not in self.wanted:
                continue
            ticket = self.ticket(0, secrets.token_hex(8))
            letters.append((node, requests.hello(ticket, name, self.job, time.time())))
            facts.append((node, name, ticket))
            self._asked[node] = now
        tickets = self.mail.post(letters) if letters else ()
        self._pending |= dict(zip(tickets, facts, strict=True))

    def _hear(self) -> None:
        for answer in self.mail.collect(list(self._pending)) if self._pending else ():
            if answer.ticket not in self._pending:
                continue
            node, name, ticket = self._pending.pop(answer.ticket)
            try:
                with believed(name or "a site"):
                    if answer.data is None:
                        raise Refused(
                            f"{name or 'a site'} has not taken up the job: {answer.error}"
                        )
                    site, count = replies.read_ready(answer.data, ticket, name, self.largest)
                    self._admit(site, node, count, keyed=bool(name))
                self.journal.joined(site, self.examples[site], answer.data)
            except Refused as refused:
                self._refused[node] = time.monotonic()
                if name:
                    self.refusals[name] = refused
                if str(refused) not in self._told:
                    self.journal.refused(name, str(refused), answer.data)
                self._once(str(refused))

    def _admit(self, site: str, node: int, told: int | Reason, keyed: bool) -> None:
        """Takes in a site, and agrees on its number of examples; none with one that cannot be.

        Such a site is asked like the others, and left out of every round by name.
        """
        if self.wanted is not None and site not in self.wanted:
            raise Refused(f"{site} is not among the sites of this run (deploy.sites)")
        twin = next((name for name in self.nodes if is_twin(name, site)), None)
        if twin is not None:
            raise Refused(f"{site} is called as {twin} is, but for case or Unicode form")
        other = self.nodes.get(site)
        # Without keys a site that starts again is a new node, beside the old one for a minute.
        if keyed and other is not None and other != node:
            raise Refused(f"{site} is there already; a second site calls itself so")
        if isinstance(told, Reason):
            self._once(f"{site}: {told.words}; what it sends is left out")
        count = 0 if isinstance(told, Reason) else told
        if count and self.examples.get(site, 0) not in (0, count):
            raise Refused(
                f"{site} now has {count} examples, and had {self.examples[site]} when the run "
                "began; put its data back as they were, or start a new run",
                kind="examples",
                figure=count,
            )
        self.refusals.pop(site, None)
        self.nodes[site], self.examples[site] = node, count or self.examples.get(site, 0)
        self._known[node] = site
        self.on_admit()
        if count:
            self._welcome(site, count)

    def _welcome(self, site: str, count: int) -> None:
        self._once(f"{site} is there, with {count} training examples", again=True)
        largest = max(self.examples, key=lambda name: self.examples[name])
        total, most = sum(self.examples.values()), self.examples[largest]
        if most < total < most / MOST_OF_ALL:
            self._once(
                f"{largest} says it has {most} training examples, more than {MOST_OF_ALL:.0%} of "
                "all, so that most of the weight is its own; robust.largest_share caps it"
            )

    def _once(self, text: str, again: bool = False) -> None:
        if again or text not in self._told:
            self._told.add(text)
            self.say(text)
