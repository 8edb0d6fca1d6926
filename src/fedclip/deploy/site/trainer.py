"""A site's trainer: a request in, an answer out. It holds the model and the site's images.

Nothing but what `wire.replies` writes leaves it: tensors, counts and losses.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedclip import files
from fedclip.deploy.messages import masks, replies, requests, results
from fedclip.deploy.messages.envelope import BadMessage, Envelope
from fedclip.deploy.messages.masks import MASKS
from fedclip.deploy.messages.requests import HELLO, RESULT, TRAIN, Ticket
from fedclip.deploy.messages.results import Tested
from fedclip.deploy.site import policy
from fedclip.deploy.site.config import SiteConfig
from fedclip.deploy.site.consent import Terms, require_base, require_consent
from fedclip.deploy.site.exchange_limits import check_request
from fedclip.deploy.site.journal import SiteJournal
from fedclip.deploy.site.masking import SiteMasks
from fedclip.deploy.site.private_state import PrivateState, drop_other_runs
from fedclip.deploy.site.requirements import is_masked, unmet
from fedclip.deploy.site.signed_result import checked_statement
from fedclip.deploy.site.work import Work, begin_work
from fedclip.errors import FedclipError, TrainingFailed, UsageError, shortened
from fedclip.experiment.evaluate import evaluate_model
from fedclip.experiment.save_adapters import save_adapter
from fedclip.federated.secure.session import Broken
from fedclip.federated.update_checks import require_sound
from fedclip.models.state import adapter_sha256
from fedclip.records import ClientReport, ClientUpdate, State, TrainRequest

if TYPE_CHECKING:
    import torch

KEPT, RESIDUAL = "kept/", "residual/"
JOB, ADAPTER = "job.json", "adapter"
PURPOSES = ("client", "personal")
"""What a site trains for; what it keeps of the second, Ditto's, is laid over that of the first."""
OWN_LOG = "its data or settings do not fit this run; its own log says how"


class SiteTrainer:
    """Answers a coordinator's messages for one site; one job at a time."""

    def __init__(self, config: SiteConfig, say: Callable[[str], None] = print) -> None:
        """`say` gets lines for the site's log."""
        self.config = config
        self._say = say
        self._work: Work | None = None
        self._journal: SiteJournal | None = None
        self._masks = SiteMasks(config)

    @property
    def journal(self) -> SiteJournal:
        """What writes the site's log."""
        if self._journal is None:
            self._journal = SiteJournal(self.config)
        return self._journal

    def answer(self, data: bytes) -> bytes:
        """The answer to a message; whatever goes wrong becomes a refusal without details."""
        ticket, site = None, self.config.name
        try:
            envelope = Envelope.unpack(data)
            ticket = Ticket.of(envelope.header)
            if envelope.header.get("site") not in ("", site):
                raise policy.Against(f"this is {site}, the message is for another site")
            if envelope.kind == HELLO:
                return self._hello(envelope, ticket)
            if envelope.kind == TRAIN:
                return self._train(envelope, ticket, data)
            if envelope.kind == RESULT:
                return self._result(envelope, ticket, data)
            if envelope.kind == MASKS:
                return self._mask_step(envelope, ticket)
            raise BadMessage(f"an unknown kind of message, {envelope.kind!r}")
        except (policy.Against, BadMessage, TrainingFailed, Broken) as error:
            return self._refused(ticket, "refused", str(error), str(error))
        except UnknownJob:
            own = ticket and self.journal.own(ticket)
            return replies.refusal(own, site, "job", "it has not been told what the run is")
        except FedclipError as error:  # may name files and classes, so its words stay here
            return self._refused(ticket, "refused", OWN_LOG, str(error))
        except Exception as error:
            why = f"an unforeseen {type(error).__name__}; its own log says more"
            self._say(f"failed: {''.join(traceback.format_exception(error))}")
            return self._refused(ticket, "failed", why, why)

    def _refused(self, ticket: Ticket | None, code: str, told: str, reason: str) -> bytes:
        """A refusal, whose reason stands in the site's log; the coordinator is `told` less."""
        self._say(f"refused: {reason}")
        self.journal.refused(ticket, reason)
        return replies.refusal(ticket and self.journal.own(ticket), self.config.name, code, told)

    def _hello(self, envelope: Envelope, ticket: Ticket) -> bytes:
        job = envelope.header.get("description")
        if not isinstance(job, Mapping) or requests.job_digest(job) != ticket.job:
            raise BadMessage("the description of the run has not arrived whole")
        theirs = envelope.header.get("time")
        if isinstance(theirs, int | float):
            policy.check_clock(theirs)
        work = self._taken_up(job, ticket)
        folder = Path(self.config.state)
        files.replace_file(folder / JOB, json.dumps(job).encode(), mode=0o600)
        drop_other_runs(folder / "private", ticket.run)
        software = {name: version(name) for name in ("fedclip", "torch")}
        facts = {"base": work.base, "app": work.app, "agreed": work.agreed}
        self.journal.joined(ticket, job, examples=work.num_examples, **facts)
        own = self.journal.own(ticket)
        return replies.ready(own, self.config.name, work.num_examples, software)

    def _train(self, envelope: Envelope, ticket: Ticket, message: bytes) -> bytes:
        work, site = self._known(ticket), self.config.name
        request, exchange, form = requests.read_train(envelope, site)
        check_request(work.job, request, exchange)
        if is_masked(work.job):
            asked = self._masks.asked(envelope, ticket, work.job, request)
            self.journal.asked(ticket, request, message)
            update = self._trained(work, request, {})
            own, binding = self.journal.own(ticket), masks.binding(envelope)
            vector = self._masks.masked(asked, binding, work.job, exchange, update)
            return self._sent(ticket, update, masks.masked(own, update.report, *vector))
        self.journal.asked(ticket, request, message)
        folder = Path(self.config.state) / "private"
        private = PrivateState(folder, ticket.run, request.purpose, self._say)
        before = private.before(request.server_round)
        kept = {name: before[KEPT + name] for name in exchange.kept if KEPT + name in before}
        update = self._trained(work, request, kept)
        tensors = dict(update.tensors)
        residual = {
            n.removeprefix(RESIDUAL): t for n, t in before.items() if n.startswith(RESIDUAL)
        }
        own = self.journal.own(ticket)
        data, lost = replies.update(own, update.report, tensors, exchange, form, residual)
        after = {KEPT + name: tensors[name] for name in exchange.kept}
        after |= {RESIDUAL + name: tensor for name, tensor in lost.items()}
        if after:
            private.save(request.server_round, after)
        return self._sent(ticket, update, data)

    def _trained(self, work: Work, request: TrainRequest, kept: State) -> ClientUpdate:
        """The site's update, which is one that may be sent."""
        if not request.shift:
            work.context.shift({})  # an earlier run of the same job may have left one
        asked = replace(request, starts={self.config.name: kept})
        (cohort,) = work.engine.train(asked)
        update = require_sound(cohort, request)
        if work.privacy is None:
            return update
        return replace(update, report=work.privacy.told(update.report, asked))

    def _sent(self, ticket: Ticket, update: ClientUpdate, data: bytes) -> bytes:
        """Writes down that an answer is about to be sent."""
        report = update.report
        self.journal.sent(ticket, report, data)
        self._say(
            f"round {ticket.server_round}: {_in_words(report)}, "
            f"{report.seconds:.1f} s, {len(data)} bytes sent"
        )
        return data

    def _mask_step(self, envelope: Envelope, ticket: Ticket) -> bytes:
        """One step of a masked sum that is no training."""
        answer = self._masks.step(envelope, self.journal.own(ticket), self._known(ticket).job)
        if (survivors := envelope.header.get("survivors")) is not None:
            step = shortened(envelope.header.get("step"), 20)
            self.journal.unmasked(ticket, step, len(survivors))
        return answer

    def _result(self, envelope: Envelope, ticket: Ticket, message: bytes) -> bytes:
        """Save the run's adapter with the site's personalised factors, and test it locally."""
        work, site = self._known(ticket), self.config.name
        state, folder = results.read_result(envelope), Path(self.config.state)
        about = (ticket, work.num_examples, adapter_sha256(envelope.tensors))
        signed = checked_statement(self.config, envelope.header, *about)
        own: dict[str, torch.Tensor] = {}
        for purpose in PURPOSES:
            private = PrivateState(folder / "private", ticket.run, purpose, self._say)
            after = private.before(ticket.server_round + 1)
            own |= {n.removeprefix(KEPT): t for n, t in after.items() if n.startswith(KEPT)}
        state = replace(state, private={site: own})
        work.context.put(state)
        figures = evaluate_model(work.context, personal=state)
        save_adapter(work.context, state, state.of(site), folder / ADAPTER)
        tests, accuracy = figures["test_examples"], figures["accuracy"]
        found = Tested(tests, round(tests * accuracy)) if tests else Tested()
        self._say(
            f"the run has ended: {found.correct} of {tests} test images of the site are "
            f"recognised; the adapter is in {folder / ADAPTER}"
        )
        self.journal.ended(ticket, found, message, adapter=str(folder / ADAPTER))
        if signed is not None:
            self.journal.seal(folder / ADAPTER, signed)
        tells = self.config.policy.tell_accuracy and work.privacy is None
        found = found if tells else Tested()
        if work.privacy is not None and ticket.server_round >= work.rounds:
            work.privacy.end()
        return results.tested(self.journal.own(ticket), site, found)

    def _known(self, ticket: Ticket) -> Work:
        """The work of a job that was taken up, also by an earlier process."""
        if self._work is not None and self._work.digest == ticket.job:
            return self._taken_up(self._work.job, ticket)
        try:
            job = files.read_json(Path(self.config.state) / JOB)
        except UsageError:
            raise UnknownJob from None
        if requests.job_digest(job) != ticket.job:
            raise UnknownJob
        return self._taken_up(job, ticket)

    def _taken_up(self, job: Mapping[str, Any], ticket: Ticket) -> Work:
        """The work of a job that the site agrees to: asked at every message, as it may not last."""
        state = Path(self.config.state)
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (reason := unmet(self.config.policy.require, job, ticket.base)) is not None:
            raise policy.Against(reason)
        asked = Terms.of(ticket, job, state)
        agreed = require_consent(self.config, asked)
        if self._work is None or not self._work.serves(ticket):
            self._masks.require_able(job)
            self._say(agreed)
            self._work = None  # one model in memory at a time
            self._work = begin_work(self.config, asked, job, ticket.job, agreed, self._say)
        require_base(asked, self._work.base)
        return self._work


def _in_words(report: ClientReport) -> str:
    if report.epsilon is None:
        return f"loss {report.loss:.3f}"
    return f"epsilon {report.epsilon:.3g} spent"


class UnknownJob(Exception):
    """A request of a run that the site has not been told about."""
