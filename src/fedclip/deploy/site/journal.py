"""What a site's log tells: jobs it took up or refused, what it was asked and sent, the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedclip.deploy.keys.folder import SITE_KEY
from fedclip.deploy.log.adapter_statement import seal_folder
from fedclip.deploy.log.chain import LOG_FILE, Log, log_key, message_facts
from fedclip.deploy.log.statement import Signer
from fedclip.deploy.messages.requests import Ticket
from fedclip.deploy.messages.results import Tested
from fedclip.deploy.site.config import SiteConfig
from fedclip.deploy.site.requirements import promised
from fedclip.errors import one_line
from fedclip.records import ClientReport, TrainRequest


class SiteJournal:
    """Writes a site's log, in its state; signed with its key, or one that is made there."""

    def __init__(self, site: SiteConfig) -> None:
        state, keys = Path(site.state), None if site.keys is None else Path(site.keys)
        self._signer = Signer(log_key(keys, SITE_KEY, state))
        self._log = Log(state / LOG_FILE, self._signer.key, site.name)
        self._name = site.name
        self._refusal: tuple[str, str] | None = None

    def own(self, ticket: Ticket) -> Ticket:
        """A ticket as the site's answer has it, with the head of its log."""
        return replace(ticket, log=self._log.head)

    def seal(self, adapter: Path, signed: Mapping[str, Any]) -> None:
        """Write the coordinator's statement beside the adapter, sealed by this site."""
        seal_folder(adapter, signed, self._name, self._signer, self._log.head)

    def joined(self, ticket: Ticket, job: Mapping[str, Any], **facts: Any) -> None:
        """A run's job was taken up."""
        self._refusal = None
        promise = {"epsilon": promised(job), "rounds": job["config"]["federation"]["rounds"]}
        self._note("joined", ticket, job=ticket.job, **promise, **facts)

    def refused(self, ticket: Ticket | None, reason: str) -> None:
        """A message was refused; repetitions are not logged again."""
        facts = ("" if ticket is None else ticket.run, one_line(reason))
        if facts != self._refusal:
            self._refusal = facts
            self._note("refused", ticket, reason=facts[1])

    def asked(self, ticket: Ticket, request: TrainRequest, message: bytes) -> None:
        """A round's request has come, and is going to be trained."""
        facts = {"round": request.server_round, "purpose": one_line(request.purpose, 40)}
        self._note("asked", ticket, **facts, **message_facts("received", message))

    def sent(self, ticket: Ticket, report: ClientReport, message: bytes) -> None:
        """The answer to it is about to be sent."""
        told = {"loss": report.loss} if report.epsilon is None else {"epsilon": report.epsilon}
        facts = {**told, "seconds": round(report.seconds, 1)}
        run = {"run": _run_of(ticket), "round": ticket.server_round}
        self._log.add("sent", **run, **facts, **message_facts("sent", message))

    def unmasked(self, ticket: Ticket, step: str, survivors: int) -> None:
        """The site has helped to unmask a sum over so many sites, or signed their list."""
        self._note("unmasked", ticket, round=ticket.server_round, step=step, survivors=survivors)

    def ended(self, ticket: Ticket, found: Tested, message: bytes, **facts: Any) -> None:
        """The run's result has come, was kept and tested: the last line before the last answer."""
        facts |= {"round": ticket.server_round, **asdict(found)}
        self._note("ended", ticket, **facts, **message_facts("received", message))

    def _note(self, event: str, ticket: Ticket | None, **facts: Any) -> None:
        """An event of a run, with the head of the coordinator's log that came with its message."""
        head = {} if ticket is None or ticket.log is None else ticket.log.header()
        self._log.add(event, run=_run_of(ticket), **facts, **head)


def _run_of(ticket: Ticket | None) -> str | None:
    """The run of a message, which another machine has named."""
    return None if ticket is None else one_line(ticket.run, 64)
