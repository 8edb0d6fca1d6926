"""The coordinator's side of one session: it carries messages, and learns nothing but the sum."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fedclip.federated.secure.ciphers import KeyPair, add_stream, derive
from fedclip.federated.secure.session import (
    SEALED_BYTES,
    Advert,
    Broken,
    Session,
    Verify,
    check_adverts,
    mask_purpose,
    transcript,
)
from fedclip.federated.secure.shamir import combine, is_share

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Aggregator:
    """Sums the vectors of one session's clients; raises Broken, naming the client to blame.

    A message that is refused changes nothing: its client has dropped out.
    """

    def __init__(self, session: Session, verify: Verify) -> None:
        self.session = session
        self._verify = verify
        self._probe = KeyPair(os.urandom(32))
        self._adverts: dict[str, Advert] = {}
        self._sealed: dict[str, dict[str, bytes]] = {}  # by sender, then receiver
        self._whole = self._purpose = b""
        self.members: tuple[str, ...] = ()  # who have sent shares: the masks are theirs
        self._total: NDArray[np.uint32] | None = None
        self._summed: set[str] = set()
        self._signatures: dict[str, bytes] = {}
        self._revealed: dict[str, Mapping[str, bytes]] = {}  # by who says it, then of whom

    def add_keys(self, advert: Advert) -> None:
        """Takes a client's keys."""
        self._require_new(advert.site, self._adverts, "keys", open_=not self._whole)
        advert.check(self.session, self._verify)
        try:
            for public in (advert.mask_key, advert.share_key):
                self._probe.agreed(public)
        except ValueError:  # with which all others would refuse the round
            raise Broken(f"the keys of {advert.site} are none that can be", advert.site) from None
        self._adverts[advert.site] = advert

    def keys(self) -> list[Advert]:
        """All keys, for every client; no more are taken."""
        self._adverts = check_adverts(self.session, list(self._adverts.values()), self._verify)
        self._whole = transcript(self.session, self._adverts)
        return list(self._adverts.values())

    def add_shares(self, site: str, sealed: Mapping[str, bytes]) -> None:
        """Takes a client's sealed shares, one for each other client that has sent keys."""
        self._require_new(site, self._sealed, "shares", among=self._adverts, open_=not self.members)
        if sealed.keys() != self._adverts.keys() - {site}:
            raise Broken(f"{site} has not sent a share for each client, and none else", site)
        if any(len(data) != SEALED_BYTES for data in sealed.values()):
            raise Broken(f"{site} sends shares of another length than shares have", site)
        self._sealed[site] = dict(sealed)

    @property
    def senders(self) -> tuple[str, ...]:
        """Those who have sent shares so far."""
        return tuple(self._sealed)

    def settle(self) -> tuple[str, ...]:
        """Ends the sending of shares; gives the members."""
        self.session.require_enough(list(self._sealed), "have sent shares")
        self.members = tuple(sorted(self._sealed))
        return self.members

    def shares_for(self, site: str) -> dict[str, bytes]:
        """The sealed shares that the other members have sent a client."""
        return {peer: self._sealed[peer][site] for peer in self.members if peer != site}

    def add_masked(self, site: str, words: NDArray[np.uint32], length: int) -> None:
        """Takes a client's masked vector, of so many words."""
        self._require_new(site, self._summed, "vector", among=self.members)
        if words.dtype != np.uint32 or words.shape != (length,):
            raise Broken(f"{site} sends a vector of {words.size} words, not of {length}", site)
        if self._total is None:
            self._total = np.zeros(length, dtype=np.uint32)
        self._total += words
        self._summed.add(site)

    def survivors(self) -> tuple[str, ...]:
        """The members whose vectors are in the sum; no more are taken."""
        self.session.require_enough(list(self._summed), "have sent a masked vector")
        return tuple(sorted(self._summed))

    def bind(self, binding: bytes) -> None:
        """Tells what is trained, to which the masks are bound."""
        self._purpose = mask_purpose(self._whole, self.members, binding)

    def add_signature(self, site: str, signature: bytes) -> None:
        """Takes a survivor's signature on the list of survivors."""
        self._require_new(site, self._signatures, "signature", among=self._summed)
        message = self.session.text("survivors", self._purpose, self.survivors())
        if not self._verify(site, message, signature):
            raise Broken(f"{site} has not signed the list of survivors", site)
        self._signatures[site] = signature

    def signatures(self) -> dict[str, bytes]:
        """The signatures that every survivor asks for before it reveals anything."""
        self.session.require_enough(list(self._signatures), "have signed the list of survivors")
        return dict(self._signatures)

    def add_revealed(self, site: str, shares: Mapping[str, bytes]) -> None:
        """Takes a survivor's shares, one of each member."""
        self._require_new(site, self._revealed, "shares to unmask", among=self._summed)
        if shares.keys() != set(self.members) or not all(map(is_share, shares.values())):
            raise Broken(f"{site} has not sent one share of each client", site)
        self._revealed[site] = dict(shares)

    def total(self) -> NDArray[np.uint32]:
        """The sum of the survivors' vectors, without masks."""
        survivors, whom = self.survivors(), sorted(self._revealed)
        self.session.require_enough(whom, "have sent their shares")
        assert self._total is not None
        places = {self.session.place(site): site for site in whom}
        shares = [
            {place: self._revealed[site][member] for place, site in places.items()}
            for member in self.members
        ]
        try:
            secrets = dict(zip(self.members, combine(shares), strict=True))
        except ValueError as error:
            raise Broken(f"the sum cannot be unmasked: {error}") from None
        total = self._total.copy()
        for site in survivors:
            add_stream(total, derive(secrets[site], "self", self._whole), subtract=True)
        for gone in sorted(set(self.members) - set(survivors)):
            self._take_off(total, gone, secrets[gone], survivors)
        return total

    def _take_off(
        self, total: NDArray[np.uint32], gone: str, secret: bytes, survivors: tuple[str, ...]
    ) -> None:
        """Takes off the masks between the survivors and one who has dropped out."""
        pair = KeyPair(secret)
        if pair.public != self._adverts[gone].mask_key:
            raise Broken(f"the sum cannot be unmasked: the shares of {gone} do not give its key")
        for site in survivors:
            common = pair.agreed(self._adverts[site].mask_key)
            key = derive(common, "pair", self._purpose)
            add_stream(total, key, subtract=site < gone)

    def _require_new(
        self,
        site: str,
        known: Mapping[str, object] | set[str],
        what: str,
        among: Mapping[str, object] | set[str] | tuple[str, ...] | None = None,
        open_: bool = True,
    ) -> None:
        if among is not None and site not in among:
            raise Broken(f"{site} sends {what} and is not among those who are asked for it", site)
        if site in known or not open_:
            raise Broken(f"{site} sends {what} twice, or too late", site)
