"""Steps of a masked sum, by mail: a letter to each site, and its answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from fedclip.deploy.messages import masks
from fedclip.deploy.messages.envelope import Envelope
from fedclip.deploy.messages.replies import Refused, believed, check_answer
from fedclip.deploy.messages.requests import Ticket
from fedclip.deploy.remote.engine import RemoteEngine, Round
from fedclip.deploy.remote.roster import Answer
from fedclip.federated.secure.session import Broken, Session

SHORT_TRIP = 120.0
"""Seconds for what takes a site no training, at the most."""


class SteppingEngine(RemoteEngine):
    """An engine that talks to the sites of a round more than once."""

    def _step(
        self,
        work: Round,
        sites: Sequence[str],
        session: Session,
        step: str,
        kind: str,
        take: Callable[[str, Envelope], None],
        **facts: Any,
    ) -> None:
        """One short step of a session, with all of some sites."""

        def letter(site: str, ticket: Ticket) -> bytes:
            return masks.ask(ticket, site, step, session, **facts)

        def heard(site: str, ticket: Ticket, data: bytes) -> None:
            largest = self._formats.largest_message
            take(site, check_answer(data, kind, ticket, site, largest))

        patience = min(SHORT_TRIP, self._patience.deadline)
        self._trip(work, sites, f"masks: {step}", letter, heard, patience)

    def _trip(
        self,
        work: Round,
        sites: Sequence[str],
        what: str,
        letter: Callable[[str, Ticket], bytes],
        take: Callable[[str, Ticket, bytes], None],
        patience: float,
    ) -> None:
        """Sends each site its letter, and takes in the answers; who gives none is left out."""
        number, end = work.request.server_round, time.monotonic() + patience
        tickets, letters = dict[str, Ticket](), dict[str, bytes]()
        for site in sites:
            if site not in self._roster.nodes or site in work.out:
                continue
            tickets[site] = self._roster.ticket(number, secrets.token_hex(8))
            letters[site] = letter(site, tickets[site])
            self._journal.asked(site, number, what, letters[site])
            self.traffic.down += len(letters[site])

        def heard(site: str, answer: Answer) -> None:
            if answer.data is None:
                failed = Refused(f"{site} has failed: {answer.error}", kind="failed")
                self._leave_out(work, site, failed)
                return
            self.traffic.up += len(answer.data)
            try:
                with believed(site):
                    try:
                        take(site, tickets[site], answer.data)
                    except Broken as error:
                        raise Refused(f"{site}: {error}", kind="masks") from None
            except Refused as refused:
                self._leave_out(work, site, refused, answer.data)
                if refused.code == "job":  # it has started anew, and must be told again
                    self._roster.forget(site)

        for site in self._talk(letters, end, heard):
            silent = Refused(f"{site} has not answered within {patience:g} s", kind="silent")
            self._leave_out(work, site, silent)
