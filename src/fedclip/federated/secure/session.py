"""What a session of secure aggregation is: who takes part, and what its messages hold.

Nobody's word is taken for anything: every message is checked where it comes in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fedclip.errors import FedclipError
from fedclip.federated.secure.ciphers import PUBLIC_BYTES, TAG_BYTES, digest, packed
from fedclip.federated.secure.shamir import SHARE_BYTES

LEAST = 3
"""Clients below which a sum hides nothing: of two, each learns the other's by its own."""
SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES
_LABEL = "fedclip masked sums 1"

Sign = Callable[[bytes], bytes]
Verify = Callable[[str, bytes, bytes], bool]
"""Whether `(site, message, signature)` is signed by the key that is pinned for the site."""


class Broken(FedclipError):
    """A step of the protocol that is refused; the text says why. `site` is who is to blame."""

    def __init__(self, text: str, site: str = "") -> None:
        super().__init__(text)
        self.site = site


def threshold(clients: int) -> int:
    """Clients whose shares unmask a sum: more than two thirds, so that no two sets of them differ
    in all their honest members while fewer than a third collude."""
    return 2 * clients // 3 + 1


@dataclass(frozen=True)
class Session:
    """One masked sum with fresh keys: run, round, nonce and cohort."""

    run: str
    server_round: int
    nonce: str
    cohort: tuple[str, ...]

    def __post_init__(self) -> None:
        if list(self.cohort) != sorted(set(self.cohort)):
            raise Broken("the clients of a session are not in order, or stand there twice")
        if len(self.cohort) < LEAST:
            raise Broken(
                f"a masked sum needs {LEAST} clients at least, got {len(self.cohort)}: of two, "
                "each learns the other's update"
            )

    @property
    def threshold(self) -> int:
        """How many of the cohort must take part, to the end."""
        return threshold(len(self.cohort))

    def place(self, site: str) -> int:
        """Where a client's shares lie, from 1."""
        return self.cohort.index(site) + 1

    @cached_property
    def _name(self) -> bytes:
        """What tells this session from all others."""
        return digest(_LABEL, self.run, self.server_round, self.nonce, self.cohort)

    def text(self, what: str, *parts: str | int | bytes | Sequence[str]) -> bytes:
        """A message of the session, as it is signed or bound to a key."""
        return packed(self._name, what, *parts)

    def require_enough(self, sites: Sequence[str], what: str) -> None:
        """Raises Broken where fewer clients than the threshold are left."""
        if len(sites) < self.threshold:
            raise Broken(
                f"{len(sites)} of {len(self.cohort)} clients {what}; a masked sum needs "
                f"{self.threshold}"
            )


@dataclass(frozen=True)
class Advert:
    """A client's public keys for one session, signed by the key that it is known by."""

    site: str
    mask_key: bytes
    share_key: bytes
    signature: bytes

    @staticmethod
    def message(session: Session, site: str, mask_key: bytes, share_key: bytes) -> bytes:
        """What is signed."""
        return session.text("keys", site, mask_key, share_key)

    def check(self, session: Session, verify: Verify) -> None:
        """Raises Broken for keys that the client has not signed for this session."""
        if self.site not in session.cohort:
            raise Broken(f"{self.site} is none of the session's clients", self.site)
        if not all(
            isinstance(key, bytes) and len(key) == PUBLIC_BYTES
            for key in (self.mask_key, self.share_key)
        ):
            raise Broken(f"{self.site} sends keys of another length", self.site)
        message = self.message(session, self.site, self.mask_key, self.share_key)
        if not verify(self.site, message, self.signature):
            raise Broken(
                f"the round's keys of {self.site} are not signed, for this round of this run, by "
                "the key that is pinned for it",
                self.site,
            )


def check_adverts(session: Session, adverts: Sequence[Advert], verify: Verify) -> dict[str, Advert]:
    """The keys by client; raises Broken for one that stands there twice, or is another's too."""
    found = {advert.site: advert for advert in adverts}
    keys = {key for advert in adverts for key in (advert.mask_key, advert.share_key)}
    if len(found) < len(adverts) or len(keys) < 2 * len(adverts):
        raise Broken("the round's keys hold a client or a key twice")
    for advert in adverts:
        advert.check(session, verify)
    session.require_enough(list(found), "have sent keys")
    return {site: found[site] for site in sorted(found)}


def transcript(session: Session, adverts: Mapping[str, Advert]) -> bytes:
    """Digest of all keys, to which whatever is said later is bound."""
    parts = [p for a in adverts.values() for p in (a.site, a.mask_key, a.share_key)]
    return digest(session.text("all keys", *parts))


def mask_purpose(whole: bytes, members: Sequence[str], binding: bytes) -> bytes:
    """What pairwise masks are bound to: they cancel only among clients who have been told the same.

    `binding` is the digest of what is trained. Without it a coordinator could give one client
    another model than the rest, and see its update alone (Pasquini et al. 2022, arXiv:2111.07380).
    """
    return digest("masks", whole, members, binding)
