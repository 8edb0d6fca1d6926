"""A site's side of masked sums: its sessions, in memory alone, and what it refuses.

It trusts the coordinator with nothing: peers are known by the site's own list of keys, a run that
was agreed to be masked is trained behind masks only, and of a round one sum is unmasked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from fedclip import files
from fedclip.config import SecureConfig
from fedclip.deploy.job import SECURE
from fedclip.deploy.keys.peers import own_peers, signer, verifier
from fedclip.deploy.messages import masks
from fedclip.deploy.messages.envelope import BadMessage, Envelope
from fedclip.deploy.messages.replies import MASK_KEYS, MASK_OPENED, MASK_SHARES, MASK_SIGNATURE
from fedclip.deploy.messages.requests import Exchange, Ticket
from fedclip.deploy.site.config import SiteConfig
from fedclip.deploy.site.policy import Against
from fedclip.deploy.site.requirements import is_masked
from fedclip.errors import UsageError, first_fault, shortened
from fedclip.federated.secure.fixed_point import DoesNotFit
from fedclip.federated.secure.participant import Participant
from fedclip.federated.secure.payload import Terms, vector_of
from fedclip.federated.secure.session import Advert, Session, threshold
from fedclip.federated.secure.simulated import too_large
from fedclip.records import ClientUpdate, TrainRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

UNMASKED = "unmasked.json"
"""In the site's state: what it never unmasks again."""
MOST_RUNS = 20
KEPT_SESSIONS = 3
MOST_UNIT = 10**9


class Vector(NamedTuple):
    """A masked vector, and the site's keys for the round after it, if there is one."""

    words: NDArray[np.uint32]
    following: Advert | None


class SiteMasks:
    """The masks of one site's trainer."""

    def __init__(self, site: SiteConfig) -> None:
        self._site = site
        self._sessions: dict[Session, Participant] = {}  # the newest last
        self._rounds = UnmaskedRounds(Path(site.state) / UNMASKED)

    def require_able(self, job: Mapping[str, Any]) -> None:
        """Raises Against for a masked job that this site has no keys, list or memory for."""
        if not is_masked(job):
            return
        if self._site.keys is None or not self._site.resident:
            key = "keys" if self._site.keys is None else "resident: true"
            raise Against(
                f"its configuration must have `{key}` for masked sums: "
                + ("they are signed" if key == "keys" else "their secrets are in memory alone")
            )
        _secure(job)
        try:
            self._peers()
        except UsageError as error:
            raise Against(f"it cannot take part in masked sums: {error}") from None

    def step(self, envelope: Envelope, ticket: Ticket, job: Mapping[str, Any]) -> bytes:
        """Answers one step of a session that is no training."""
        self._require_masked(job)
        header, site = envelope.header, self._site.name
        session, step = masks.read_session(header.get("session"), ticket.run), header.get("step")
        if step == "keys":
            advert = self._begin(session)
            return masks.answer(MASK_KEYS, ticket, site, keys=masks.adverts_json([advert]))
        own = self._known(session)
        if step == "shares":
            sealed = own.shares(masks.read_adverts(header.get("adverts")))
            return masks.answer(MASK_SHARES, ticket, site, shares=masks.bytes_json(sealed))
        survivors = masks.read_names(header.get("survivors"))
        if step == "confirm":
            signature = masks.signature_json(own.confirm(survivors))
            return masks.answer(MASK_SIGNATURE, ticket, site, signature=signature)
        if step != "open":
            raise BadMessage(f"an unknown step of a masked sum, {shortened(step)}")
        self._require_first(session)
        self._rounds.add(session)  # also if what follows fails
        shares = own.reveal(survivors, masks.read_bytes(header.get("signatures")))
        following = self._next_shares(header.get("next"), ticket)
        opened = masks.bytes_json(shares)
        return masks.answer(MASK_OPENED, ticket, site, opened=opened, shares=following)

    def masked(
        self,
        asked: Asked,
        binding: bytes,
        job: Mapping[str, Any],
        exchange: Exchange,
        update: ClientUpdate,
    ) -> Vector:
        """The update behind its masks, which are bound to the request."""
        session, secure, report = asked.session, _secure(job), update.report
        terms = Terms(len(session.cohort), asked.unit, secure.largest_change)
        names = sorted(field.name for field in exchange.answer_layout)
        try:
            words = vector_of(
                update.tensors, exchange.start, names, report.num_examples, report.loss, terms
            )
        except DoesNotFit as error:
            raise Against(too_large(error).words) from None
        own = self._known(session)
        hidden = own.masked(words, asked.sealed, binding)
        following = None if asked.following is None else self._begin(asked.following)
        return Vector(hidden, following)

    def asked(
        self, envelope: Envelope, ticket: Ticket, job: Mapping[str, Any], request: TrainRequest
    ) -> Asked:
        """What a training request asks of the masks; raises Against before anything is trained."""
        header: Any = envelope.header.get(masks.MASKS)
        if not isinstance(header, Mapping):
            raise Against(
                "the coordinator asks for an update without masks, and this run was agreed to be "
                "masked"
            )
        self._require_masked(job)
        session = masks.read_session(header.get("session"), ticket.run)
        if not session.server_round == ticket.server_round == request.server_round:
            raise Against("the masks are those of another round than the training's")
        if request.ranks or request.offsets or request.start_loss:
            raise Against("the coordinator asks for more than a masked sum shows")
        self._require_first(session)
        self._known(session)
        unit = header.get("unit")
        if type(unit) is not int or not 1 <= unit <= MOST_UNIT:
            raise BadMessage(f"the unit of the weights cannot be {shortened(unit)}")
        following = header.get("next")
        then = None if following is None else masks.read_session(following, ticket.run)
        if then is not None and then.server_round != session.server_round + 1:
            raise Against("keys are asked for, for another round than the next")
        return Asked(session, masks.read_bytes(header.get("sealed")), unit, then)

    def _begin(self, session: Session) -> Advert:
        """New secrets for a session, after all that is known here has been compared."""
        self._require_first(session)
        peers = self._peers()
        if strange := sorted(set(session.cohort) - peers.keys()):
            raise Against(
                f"its list of peers has no key of {strange[0]}, which is to be in the masked sum; "
                "`fedclip keys peers` writes a new list"
            )
        least = self._site.policy.least_masked or threshold(len(peers))
        if session.threshold < least:
            raise Against(
                f"a masked sum over {session.threshold} sites is the least that "
                f"{len(session.cohort)} of them would unmask, and it takes part in sums over "
                f"{least} at least (policy.least_masked)"
            )
        if session in self._sessions:
            raise Against("new keys are asked for in a session that has some: a message, replayed")
        name, keys = self._site.name, Path(str(self._site.keys))
        own = Participant(name, session, signer(keys), verifier(peers))
        while len(self._sessions) >= KEPT_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        self._sessions[session] = own
        return own.keys()

    def _next_shares(self, value: Any, ticket: Ticket) -> dict[str, str] | None:
        """Shares for the next round, whose keys came along."""
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise BadMessage("the keys of the next round cannot be read")
        own = self._known(masks.read_session(value.get("session"), ticket.run))
        return masks.bytes_json(own.shares(masks.read_adverts(value.get("adverts"))))

    def _known(self, session: Session) -> Participant:
        if session not in self._sessions:
            raise Against(
                "it has no keys of this masked sum: it has started anew, or the message is an old "
                "one, replayed"
            )
        return self._sessions[session]

    def _peers(self) -> dict[str, str]:
        return own_peers(Path(str(self._site.keys)), self._site.name)

    def _require_first(self, session: Session) -> None:
        if session.server_round <= (last := self._rounds.last(session.run)):
            raise Against(
                f"it has helped to unmask round {last} already; a second sum of the same round "
                f"would show single updates ({UNMASKED} in the site's state keeps count)"
            )

    def _require_masked(self, job: Mapping[str, Any]) -> None:
        if not is_masked(job):
            raise Against("masks are asked for, in a run that is not masked")


class UnmaskedRounds:
    """The last round of each run that the site has helped to unmask, also after a restart."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def last(self, run: str) -> int:
        """Its number, 0 for none."""
        return self._read().get(run, 0)

    def add(self, session: Session) -> None:
        """Record a session's round before anything of it is sent."""
        known = {run: last for run, last in self._read().items() if run != session.run}
        kept = dict(list(known.items())[-(MOST_RUNS - 1) :]) | {session.run: session.server_round}
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        files.replace_file(self._path, json.dumps(kept).encode(), mode=0o600)

    def _read(self) -> dict[str, int]:
        found = files.read_json(self._path) if self._path.exists() else {}
        if not isinstance(found, dict) or any(type(last) is not int for last in found.values()):
            raise UsageError(f"{self._path} is damaged; put it back")
        return found


class Asked(NamedTuple):
    """What a training request says of its masks."""

    session: Session
    sealed: dict[str, bytes]
    unit: int
    following: Session | None


def _secure(job: Mapping[str, Any]) -> SecureConfig:
    try:
        secure = SecureConfig.model_validate(job.get(SECURE))
    except ValidationError as error:
        raise BadMessage(f"the job's masks cannot be read: {first_fault(error)}") from None
    if not secure.masked:
        raise BadMessage("the job says that it is masked, and not how")
    return secure
