"""Masked sums over sites on other machines: the coordinator's side of the protocol, by mail.

A round is two trips to each site while all stay: training, whose answer brings the masked vector
and the keys of the next round, and unmasking, whose answer brings shares and those of the next
round. Keys that were not made ready that way take two more, and so does a list of survivors that
lacks somebody one more, to be signed.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Any

from fedclip.deploy.messages import masks, requests
from fedclip.deploy.messages.envelope import Envelope
from fedclip.deploy.messages.replies import (
    MASK_KEYS,
    MASK_OPENED,
    MASK_SHARES,
    MASK_SIGNATURE,
    Refused,
)
from fedclip.deploy.messages.requests import Exchange, Ticket
from fedclip.deploy.remote.engine import Round
from fedclip.deploy.remote.last_sum import LastSum
from fedclip.deploy.remote.mask_steps import SteppingEngine
from fedclip.errors import TrainingFailed
from fedclip.federated.secure.aggregator import Aggregator
from fedclip.federated.secure.payload import Terms, mean_of
from fedclip.federated.secure.session import Advert, Broken, Session, Verify, threshold
from fedclip.records import ClientReport, Cohort, SecureSum, TrainRequest


@dataclass(frozen=True)
class MaskPlan:
    """How a run's sums are masked; `ahead`: the next round's clients are those of this one."""

    verify: Verify
    last_round: int
    largest_change: float
    most_examples: int | None = None
    ahead: bool = True


class MaskedRemoteEngine(SteppingEngine):
    """Trains the sites of a round at once, and learns nothing but their sum."""

    def __init__(self, *of_engine: Any, plan: MaskPlan, last: LastSum, **more: Any) -> None:
        """As the engine without masks; `last` keeps the last sum for a coordinator's restart."""
        super().__init__(*of_engine, **more)
        self._plan, self._last = plan, last
        self._prepared: Aggregator | None = None  # the next round's, whose keys are known

    def train(self, request: TrainRequest) -> Iterator[Cohort]:
        """Yields one cohort: the reports, without losses, and the sum.

        Raises TrainingFailed, naming who is missing, if too few stay in every attempt. A round is
        never summed a second time: once a site has helped to unmask one, it does not take part
        in the same round again.
        """
        self._journal.round(request)
        if (known := self._last.read(request)) is not None:
            self._say(f"round {request.server_round}: its sum was unmasked before the restart")
            yield known
            return
        work = Round(request)
        for attempt in range(1, self._patience.attempts + 1):
            try:
                cohort = self._sum(work)
                break
            except Broken as error:
                text = f"round {request.server_round}: {error}"
                if attempt == self._patience.attempts:
                    raise TrainingFailed(f"{text}; the last finished round is kept") from None
                self._say(f"{text}; asked again, with new keys")
                work.out.clear()
                self._prepared = None
        self._last.keep(request, cohort)
        yield cohort

    def _sum(self, work: Round) -> Cohort:
        request, number = work.request, work.request.server_round
        needed = max(
            self._patience.needed(len(request.client_ids)), threshold(len(request.client_ids))
        )
        end = time.monotonic() + self._patience.deadline
        self._roster.greet(until=end, enough=lambda: self._present(work) >= needed)
        here = [site for site in request.client_ids if site in self._roster.nodes]
        for site in [s for s in request.client_ids if s not in here]:
            self._say(f"round {number}: {site} is not there")
        if len(here) < needed:
            raise Broken(self._too_few(work, here, needed))
        now = self._ready(work, here)
        terms = self._terms(request)
        following = self._session(request, number + 1) if self._goes_on(request) else None
        reports, adverts, start = self._vectors(work, now, terms, following)
        if len(reports) < needed:
            raise Broken(self._too_few(work, list(reports), needed))
        total = self._unmasked(work, now, following, adverts, start, reports, terms)
        told = tuple(reports[site] for site in request.client_ids if site in reports)
        absent = self._absent(work, reports)
        for one in absent:
            self._journal.left_out(number, one)
        return Cohort(told, {}, tuple(work.left_out) + absent, total)

    def _too_few(self, work: Round, here: Sequence[str], needed: int) -> str:
        missing = ", ".join(s for s in work.request.client_ids if s not in here)
        return (
            f"{len(here)} of {len(work.request.client_ids)} sites have answered, a masked sum "
            f"needs {needed}; missing: {missing}"
        )

    def _terms(self, request: TrainRequest) -> Terms:
        counts = [self._roster.examples.get(site, 0) for site in request.client_ids]
        unit = min(max(counts), self._plan.most_examples or max(counts))
        return Terms(len(counts), max(1, unit), self._plan.largest_change)

    def _goes_on(self, request: TrainRequest) -> bool:
        return self._plan.ahead and request.server_round < self._plan.last_round

    def _session(self, request: TrainRequest, server_round: int) -> Session:
        cohort = tuple(sorted(request.client_ids))
        return Session(self._roster.run, server_round, secrets.token_hex(16), cohort)

    # --- keys and shares ---

    def _ready(self, work: Round, here: Sequence[str]) -> Aggregator:
        """The session of this round, settled: the prepared one, if all who are there are in it."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            session = prepared.session
            same = session.server_round == work.request.server_round
            same = same and session.cohort == tuple(sorted(work.request.client_ids))
            if same and set(here) <= set(prepared.senders):
                prepared.settle()
                return prepared
        now = Aggregator(self._session(work.request, work.request.server_round), self._plan.verify)

        def keys(site: str, envelope: Envelope) -> None:
            for advert in masks.read_adverts(envelope.header.get("keys")):
                _own(site, advert)
                now.add_keys(advert)

        self._step(work, here, now.session, "keys", MASK_KEYS, keys)
        adverts = masks.adverts_json(now.keys())

        def shares(site: str, envelope: Envelope) -> None:
            now.add_shares(site, masks.read_bytes(envelope.header.get("shares")))

        with_keys = [site for site, *_ in adverts]
        self._step(work, with_keys, now.session, "shares", MASK_SHARES, shares, adverts=adverts)
        now.settle()
        return now

    # --- the masked vectors ---

    def _vectors(
        self, work: Round, now: Aggregator, terms: Terms, following: Session | None
    ) -> tuple[dict[str, ClientReport], list[Advert], Exchange]:
        """Has the members train; gives their reports, their next keys, and what they start from."""
        request, started = work.request, time.monotonic()
        reports, adverts = dict[str, ClientReport](), list[Advert]()
        names = sorted(request.names_sent)
        exchanges: list[Exchange] = []

        def letter(site: str, ticket: Ticket) -> bytes:
            own = {
                "session": masks.session_json(now.session),
                "unit": terms.unit,
                "next": None if following is None else masks.session_json(following),
                "sealed": masks.bytes_json(now.shares_for(site)),
            }
            form = self._formats.down
            data, exchange = requests.train(request, site, ticket, form, "fp32", {masks.MASKS: own})
            if not exchanges:
                exchanges.append(exchange)
                now.bind(masks.binding(Envelope.unpack(data)))
            return data

        def take(site: str, ticket: Ticket, data: bytes) -> None:
            largest = self._formats.largest_message
            report, words, advert = masks.read_masked(
                data, ticket, site, request, largest, self._formats.private
            )
            self._require_others_count(work, site)
            now.add_masked(site, words, terms.length(exchanges[0].start, names))
            reports[site] = report
            if advert is not None and following is not None:
                _own(site, advert)
                adverts.append(advert)
            self._journal.answered(report, request.server_round, data)
            self._say(
                f"round {request.server_round}: {site} has answered after "
                f"{time.monotonic() - started:.1f} s ({len(reports)} of {len(now.members)})"
            )

        self._trip(work, now.members, "train", letter, take, self._patience.deadline)
        if not exchanges:
            raise Broken("no site is there that could train behind masks")
        return reports, adverts, exchanges[0]

    # --- the sum ---

    def _unmasked(
        self,
        work: Round,
        now: Aggregator,
        following: Session | None,
        adverts: Sequence[Advert],
        start: Exchange,
        reports: dict[str, ClientReport],
        terms: Terms,
    ) -> SecureSum:
        """The sum; once it is asked for, the round is not repeated."""
        survivors, signatures = now.survivors(), dict[str, str]()
        if survivors != now.members:
            signatures = self._signed(work, now, survivors)
        after, keys = self._begin_next(following, adverts)
        facts = {"survivors": list(survivors), "signatures": signatures, "next": keys}

        def opened(site: str, envelope: Envelope) -> None:
            now.add_revealed(site, masks.read_bytes(envelope.header.get("opened")))
            shares = envelope.header.get("shares")
            if after is not None and shares is not None:
                after.add_shares(site, masks.read_bytes(shares))

        self._step(work, survivors, now.session, "open", MASK_OPENED, opened, **facts)
        names = sorted(work.request.names_sent)
        examples = [reports[site].num_examples for site in survivors]
        try:
            found = mean_of(now.total(), start.start, names, examples, terms)
        except Broken as error:
            raise TrainingFailed(
                f"round {work.request.server_round}: {error}; there is no sum, and the last "
                "finished round is kept. Sites that have helped to unmask a round do not repeat "
                "it: their operators may allow it (unmasked.json), or a new run begins"
            ) from None
        self._prepared = after
        return replace(found, loss=nan) if self._formats.private else found

    def _signed(self, work: Round, now: Aggregator, survivors: Sequence[str]) -> dict[str, str]:
        """The signatures of the survivors on their list, in which somebody is missing."""

        def signature(site: str, envelope: Envelope) -> None:
            now.add_signature(site, masks.read_signature(envelope.header.get("signature")))

        facts = {"survivors": list(survivors)}
        self._step(work, survivors, now.session, "confirm", MASK_SIGNATURE, signature, **facts)
        return masks.bytes_json(now.signatures())

    def _begin_next(
        self, following: Session | None, adverts: Sequence[Advert]
    ) -> tuple[Aggregator | None, dict[str, Any] | None]:
        """The next round's session, and its keys, which are handed on along the way."""
        if following is None:
            return None, None
        after = Aggregator(following, self._plan.verify)
        try:
            for advert in adverts:
                after.add_keys(advert)
            keys = masks.adverts_json(after.keys())
        except Broken:  # the next round begins with keys of its own
            return None, None
        return after, {"session": masks.session_json(following), "adverts": keys}


def _own(site: str, advert: Advert) -> None:
    """Refuses keys that one site sends in the name of another."""
    if advert.site != site:
        raise Refused(f"{site} sends keys in the name of {advert.site}")
