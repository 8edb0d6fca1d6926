"""The engine whose clients are other machines: messages out, answers in, until a deadline.

It knows nothing of networks: a `Mail` carries bytes. `flower.py` has the one over Flower.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import median
from typing import Any

from fedclip.deploy.messages import replies, requests, results
from fedclip.deploy.messages.codec import Format
from fedclip.deploy.messages.outliers import too_large
from fedclip.deploy.messages.replies import Refused, Update, believed
from fedclip.deploy.messages.requests import Exchange, Ticket
from fedclip.deploy.messages.results import Tested
from fedclip.deploy.remote.roster import Answer, Mail, Patience, Roster
from fedclip.errors import TrainingFailed, one_line
from fedclip.records import Cohort, LeftOut, RunState, TrainRequest

__all__ = ["Formats", "Mail", "Patience", "RemoteEngine", "Roster", "Traffic"]


@dataclass(frozen=True)
class Formats:
    """Numbers on the wire, and the limits of what is taken from a site."""

    down: Format = "fp32"
    up: Format = "fp32"
    largest_message: int = 2**28
    largest_update: float = 10.0
    most_examples: float | None = None  # times those of all other sites, if examples weigh
    cap: str = "robust.largest_share"  # the key that bounds what one site weighs
    private: bool = False  # sites tell the epsilon that they have spent, and no losses


@dataclass
class Traffic:
    """Bytes of the messages, as they were handed to the mail and came from it."""

    up: int = 0
    down: int = 0
    results: int = 0  # both ways, at the end of the run


@dataclass
class Round:
    """What is under way for one request: whom was asked what, and what has come."""

    request: TrainRequest
    exchanges: dict[str, tuple[Ticket, Exchange]] = field(default_factory=dict)
    updates: dict[str, Update] = field(default_factory=dict)
    out: set[str] = field(default_factory=set)  # refused or failed: not asked again
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def open(self) -> list[str]:
        """Sites that have neither answered nor dropped out."""
        ids = self.request.client_ids
        return [site for site in ids if site not in self.updates and site not in self.out]

    @property
    def sizes(self) -> dict[str, float]:
        """The changes' norms by the root of the steps, by site: more steps lead further."""
        return {site: own.change / sqrt(own.report.steps) for site, own in self.updates.items()}


class RemoteEngine:
    """Trains a round's sites in parallel, and aggregates the replies within the timeout."""

    def __init__(
        self,
        mail: Mail,
        roster: Roster,
        patience: Patience,
        formats: Formats,
        *,
        say: Callable[[str], None],
        traffic: Traffic | None = None,
    ) -> None:
        """`say` gets a line about each site's part."""
        self._mail = mail
        self._roster = roster
        self._journal = roster.journal
        self._patience = patience
        self._formats = formats
        self._say = say
        self._usual: float | None = None  # the norm of updates so far
        self.traffic = traffic or Traffic()

    def train(self, request: TrainRequest) -> Iterator[Cohort]:
        """Yields a cohort of one per site that answered, in the order of `request.client_ids`.

        Only what was asked for is in it: what a site keeps does not come here. The last has who was
        left out. Raises TrainingFailed, naming the sites that are missing, if there are too few in
        every attempt.
        """
        work = Round(request)
        self._journal.round(request)
        needed = self._patience.needed(len(request.client_ids))
        for attempt in range(1, self._patience.attempts + 1):
            self._attempt(work)
            self._drop_outliers(work)
            if len(work.updates) >= needed:
                break
            missing = ", ".join(s for s in request.client_ids if s not in work.updates)
            text = (
                f"round {request.server_round}: {len(work.updates)} of "
                f"{len(request.client_ids)} sites have answered, {needed} are needed; "
                f"missing: {missing}"
            )
            if attempt == self._patience.attempts:
                raise TrainingFailed(f"{text}; the last finished round is kept")
            self._say(f"{text}; asked again")
            work.out.clear()
        if work.updates:
            self._usual = median(work.sizes.values())
        for site in request.client_ids:
            if site in work.updates:
                update = work.updates[site]
                tensors = {n: t[None] for n, t in update.tensors.items()}
                yield Cohort((update.report,), tensors)
        absent = self._absent(work, work.updates)
        for one in absent:
            self._journal.left_out(request.server_round, one)
        yield Cohort((), {}, tuple(work.left_out) + absent)

    def _absent(self, work: Round, answered: Container[str]) -> tuple[LeftOut, ...]:
        """The sites that nothing has come from, and why, where they may not join."""
        heard = {one.client_id for one in work.left_out}
        absent = [s for s in work.request.client_ids if s not in answered and s not in heard]
        silent = Refused("it has not answered", kind="silent")
        return tuple(_left_out(site, self._roster.refusals.get(site, silent)) for site in absent)

    def give_results(
        self, state: RunState, server_round: int, signed: Mapping[str, Any] | None = None
    ) -> dict[str, Tested]:
        """Gives every site that is there what the run ended with; what they say of it, by site.

        A site that is silent until the deadline, or refuses, is left out.
        """
        end = time.monotonic() + self._patience.deadline
        self._roster.greet(time.monotonic(), lambda: True)
        tickets = {
            site: self._roster.ticket(server_round, secrets.token_hex(8))
            for site in sorted(self._roster.nodes)
        }
        letters = {s: results.result(state, s, own, signed) for s, own in tickets.items()}
        for site, data in letters.items():
            self._journal.asked(site, server_round, "result", data)
        self.traffic.results += sum(map(len, letters.values()))
        found: dict[str, Tested] = {}

        def take(site: str, answer: Answer) -> None:
            if answer.data is None:
                self._say(one_line(f"{site} has not taken the result: {answer.error}"))
                return
            self.traffic.results += len(answer.data)
            largest = self._formats.largest_message
            try:
                with believed(site):
                    found[site] = results.read_tested(answer.data, tickets[site], site, largest)
            except Refused as refused:
                self._say(f"the result: {refused}")
            else:
                self._journal.tested(site, found[site], answer.data)

        for site in self._talk(letters, end, take):
            self._say(f"{site} has not answered to the result")
        return found

    def _attempt(self, work: Round) -> None:
        """Asks all that are there, and takes in answers until all have come or time is up."""
        started = time.monotonic()
        end = started + self._patience.deadline
        number = work.request.server_round
        needed = self._patience.needed(len(work.request.client_ids))
        self._roster.greet(until=end, enough=lambda: self._present(work) >= needed)
        here = [site for site in work.open if site in self._roster.nodes]
        for site in [s for s in work.open if s not in here]:
            self._say(f"round {number}: {site} is not there")
        for site in self._talk(
            self._letters(work, here),
            end,
            lambda site, answer: self._take(work, site, answer.data, answer.error, started),
        ):
            self._say(
                f"round {number}: {site} has not answered within "
                f"{self._patience.deadline:g} s; the round goes on without it"
            )

    def _talk(
        self, letters: Mapping[str, bytes], end: float, take: Callable[[str, Answer], None]
    ) -> list[str]:
        """Sends to sites and hands on their answers until the clock says `end`; who is silent."""
        nodes = [(self._roster.nodes[site], data) for site, data in letters.items()]
        asked = dict(zip(self._mail.post(nodes), letters, strict=True))
        while asked:  # looked at once more when time is up: what has come by then counts
            last = time.monotonic() >= end
            for answer in self._mail.collect(list(asked)):
                if answer.ticket in asked:
                    take(asked.pop(answer.ticket), answer)
            if last:
                break
            if asked:
                time.sleep(self._patience.look)
        self._mail.forget(list(asked))
        return list(asked.values())

    def _present(self, work: Round) -> int:
        return len(work.updates) + sum(site in self._roster.nodes for site in work.open)

    def _letters(self, work: Round, sites: Sequence[str]) -> dict[str, bytes]:
        """The request to each of the sites."""
        letters = {}
        for site in sites:
            ticket = self._roster.ticket(work.request.server_round, secrets.token_hex(8))
            data, exchange = requests.train(
                work.request, site, ticket, self._formats.down, self._formats.up
            )
            work.exchanges[site] = ticket, exchange
            self._journal.asked(site, work.request.server_round, "train", data)
            self.traffic.down += len(data)
            letters[site] = data
        return letters

    def _take(self, work: Round, site: str, data: bytes | None, error: str, started: float) -> None:
        number = work.request.server_round
        if data is None:
            self._leave_out(work, site, Refused(f"{site} has failed: {error}", kind="failed"))
            return
        self.traffic.up += len(data)
        ticket, exchange = work.exchanges[site]
        try:
            with believed(site):
                work.updates[site] = replies.read_update(
                    data,
                    ticket,
                    site,
                    exchange,
                    self._formats.up,
                    request=work.request,
                    largest=self._formats.largest_message,
                    private=self._formats.private,
                )
                self._require_others_count(work, site)
        except Refused as refused:
            work.updates.pop(site, None)
            self._leave_out(work, site, refused, data)
            if refused.code == "job":  # it has started anew, and must be told again
                self._roster.forget(site)
            return
        self._journal.answered(work.updates[site].report, number, data)
        self._say(
            f"round {number}: {site} has answered after {time.monotonic() - started:.1f} s "
            f"({len(work.updates)} of {len(work.request.client_ids)})"
        )

    def _require_others_count(self, work: Round, site: str) -> None:
        """Refuses a site beside whose number of examples all others together are as good as none.

        That number is its own word, and the round's result would be its own update.
        """
        agreed, limit = self._roster.examples, self._formats.most_examples
        others = sum(agreed.get(name, 0) for name in work.request.client_ids if name != site)
        if limit is not None and agreed[site] > limit * others > 0:
            raise Refused(
                f"{site} says it has {agreed[site]} examples, over {limit:g} times those of all "
                f"other sites, so that all weight would be its own; {self._formats.cap} caps what "
                "one site weighs, and then takes it in",
                kind="examples",
                figure=agreed[site] / others,
            )

    def _drop_outliers(self, work: Round) -> None:
        limit = self._formats.largest_update
        for site, refused in too_large(work.sizes, limit, self._usual).items():
            del work.updates[site]
            self._leave_out(work, site, refused)

    def _leave_out(
        self, work: Round, site: str, refused: Refused, answer: bytes | None = None
    ) -> None:
        """Drop a site from the round: reported, and noted in the round's record."""
        work.out.add(site)
        work.left_out.append(_left_out(site, refused))
        self._journal.left_out(work.request.server_round, work.left_out[-1], answer)
        self._say(f"round {work.request.server_round}: left out: {refused}")


def _left_out(site: str, refused: Refused) -> LeftOut:
    reason = str(refused).removeprefix(site).lstrip(": ")
    return LeftOut(site, refused.kind, reason, refused.figure)
