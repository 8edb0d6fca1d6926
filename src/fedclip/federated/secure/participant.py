"""A client's side of one session: every step once, in order, and never more than it may tell.

Of a peer it gives the share of the self mask's seed, or that of the masks' key, never both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from fedclip.federated.secure.ciphers import KeyPair, add_stream, derive, seal, unseal
from fedclip.federated.secure.session import (
    SEALED_BYTES,
    Advert,
    Broken,
    Session,
    Sign,
    Verify,
    check_adverts,
    mask_purpose,
    transcript,
)
from fedclip.federated.secure.shamir import SHARE_BYTES, is_share, split

if TYPE_CHECKING:
    from numpy.typing import NDArray

STEPS = ("keys", "shares", "masked", "revealed")
_FAILED = -1


class _Secrets:
    """In memory only, and gone as soon as they are not needed."""

    def __init__(self) -> None:
        self.seed, self.key = os.urandom(32), os.urandom(32)  # of the self mask, of those of pairs
        self.mask, self.share = KeyPair(self.key), KeyPair(os.urandom(32))


class Participant:
    """One client in one session."""

    def __init__(self, name: str, session: Session, sign: Sign, verify: Verify) -> None:
        if name not in session.cohort:
            raise Broken(f"{name} is not among the session's clients")
        self.name, self.session = name, session
        self._sign, self._verify = sign, verify
        self._secrets: _Secrets | None = _Secrets()
        self._adverts: dict[str, Advert] = {}
        self._channels: dict[str, bytes] = {}  # the secret shared with each peer
        self._step = 0
        self._whole = self._purpose = b""
        self._own: tuple[bytes, bytes] = b"", b""
        self._shares: dict[str, tuple[bytes, bytes]] = {}  # of each member's seed and key
        self._agreed_on: tuple[str, ...] | None = None  # the only list of survivors

    def keys(self) -> Advert:
        """The first step: the public keys of this session."""
        with self._once("keys"):
            secrets = self._held()
            public = secrets.mask.public, secrets.share.public
            message = Advert.message(self.session, self.name, *public)
            own = Advert(self.name, *public, self._sign(message))
            self._adverts = {self.name: own}
        return own

    def shares(self, adverts: Sequence[Advert]) -> dict[str, bytes]:
        """The second: shares of both secrets, sealed for each peer, by peer."""
        with self._once("shares"):
            secrets = self._held()
            found = check_adverts(self.session, adverts, self._verify)
            if found.get(self.name) != self._adverts[self.name]:
                raise Broken("the round's keys do not hold this client's own")
            self._adverts, self._whole = found, transcript(self.session, found)
            places = [self.session.place(site) for site in found]
            needed = self.session.threshold
            pieces = (split(secret, places, needed) for secret in (secrets.seed, secrets.key))
            both = dict(zip(found, zip(*pieces, strict=True), strict=True))
            self._own = both.pop(self.name)
            return {
                peer: seal(self._key(self.name, peer), b"".join(two), self._bound(self.name, peer))
                for peer, two in both.items()
            }

    def masked(
        self, words: NDArray[np.uint32], sealed: Mapping[str, bytes], binding: bytes
    ) -> NDArray[np.uint32]:
        """The third: the vector behind its masks; `sealed` are the shares from each peer.

        Those who have sent shares are the session's members, to whom masks are bound.
        """
        with self._once("masked"):
            secrets = self._held()
            if words.dtype != np.uint32 or words.ndim != 1:
                raise Broken("a masked vector is one row of 32-bit words")
            self._shares = {peer: self._opened(peer, sealed[peer]) for peer in sorted(sealed)}
            self._shares[self.name] = self._own
            members = sorted(self._shares)
            self.session.require_enough(members, "have sent shares")
            self._purpose = mask_purpose(self._whole, members, binding)
            total = words.copy()
            add_stream(total, derive(secrets.seed, "self", self._whole))
            for peer in members:
                if peer != self.name:
                    key = derive(self._agreed(secrets.mask, peer), "pair", self._purpose)
                    add_stream(total, key, subtract=peer < self.name)
            self._secrets = None
            self._channels.clear()
        return total

    def confirm(self, survivors: Sequence[str]) -> bytes:
        """Signs the list of those whose vectors are summed, where not all members are among them.

        A client signs one list in a session.
        """
        if self._step != STEPS.index("masked") + 1:
            raise Broken("the survivors are told out of turn")
        self._settle(survivors)
        return self._sign(self._message(tuple(survivors)))

    def reveal(self, survivors: Sequence[str], signatures: Mapping[str, bytes]) -> dict[str, bytes]:
        """The last: by member the share that takes its mask off.

        Where somebody is missing, so many survivors as the threshold must have signed the list.
        """
        with self._once("revealed"):
            self._settle(survivors)
            if len(survivors) < len(self._shares):
                self._require_signed(tuple(survivors), signatures)
            shares, self._shares, self._own = self._shares, {}, (b"", b"")
            return {
                site: seed if site in survivors else key for site, (seed, key) in shares.items()
            }

    @contextmanager
    def _once(self, step: str) -> Iterator[None]:
        """Each step once, in their order; one that fails ends the session."""
        number = STEPS.index(step)
        if self._step == _FAILED:
            raise Broken("this session has failed; a round is repeated with new keys")
        if self._step != number:
            again = "a second time" if number < self._step else "out of turn"
            raise Broken(f"asked for step {number + 1} of the masks ({step}) {again}")
        self._step = _FAILED
        yield
        self._step = number + 1

    def _held(self) -> _Secrets:
        if self._secrets is None:
            raise Broken("this session's secrets are gone")
        return self._secrets

    def _agreed(self, own: KeyPair, peer: str) -> bytes:
        advert, is_mask = self._adverts[peer], own is self._held().mask
        try:
            return own.agreed(advert.mask_key if is_mask else advert.share_key)
        except ValueError:
            raise Broken(f"the keys of {peer} are none that can be", peer) from None

    def _key(self, sender: str, receiver: str) -> bytes:
        """The key to what one client seals for another, of whom one is this one."""
        peer = receiver if sender == self.name else sender
        if peer not in self._channels:
            self._channels[peer] = self._agreed(self._held().share, peer)
        return derive(self._channels[peer], "shares", self._whole, sender, receiver)

    def _bound(self, sender: str, receiver: str) -> bytes:
        return self.session.text("shares", self._whole, sender, receiver)

    def _opened(self, peer: str, sealed: bytes) -> tuple[bytes, bytes]:
        if peer == self.name or peer not in self._adverts:
            raise Broken(f"shares come from {peer}, which has sent no keys", peer)
        if not isinstance(sealed, bytes) or len(sealed) != SEALED_BYTES:
            raise Broken(f"the shares of {peer} have another length than shares have", peer)
        try:
            text = unseal(self._key(peer, self.name), sealed, self._bound(peer, self.name))
        except ValueError:
            raise Broken(
                f"the shares of {peer} were not sealed for this session and client: damaged, or "
                "replayed from another",
                peer,
            ) from None
        two = text[:SHARE_BYTES], text[SHARE_BYTES:]
        if not all(map(is_share, two)):
            raise Broken(f"the shares of {peer} are none that can be", peer)
        return two

    def _settle(self, survivors: Sequence[str]) -> None:
        """Holds the client to the one list of survivors that it was first told of."""
        if list(survivors) != sorted(set(survivors)) or not set(survivors) <= self._shares.keys():
            raise Broken("the survivors are not all members of the session")
        if self.name not in survivors:
            raise Broken("this client's vector is not in the sum, so it helps nobody to unmask it")
        self.session.require_enough(survivors, "are left")
        if self._agreed_on not in (None, tuple(survivors)):
            raise Broken("another list of survivors than before: only one sum is unmasked")
        self._agreed_on = tuple(survivors)

    def _message(self, survivors: tuple[str, ...]) -> bytes:
        return self.session.text("survivors", self._purpose, survivors)

    def _require_signed(self, survivors: tuple[str, ...], signatures: Mapping[str, bytes]) -> None:
        message = self._message(survivors)
        for site, signature in signatures.items():
            if site not in survivors or not self._verify(site, message, signature):
                raise Broken(f"{site} has not signed this list of survivors", site)
        self.session.require_enough(list(signatures), "have signed the list of survivors")
