"""Sessions of masked sums in one process, with clients that drop out where a test says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclip.federated.secure.aggregator import Aggregator
from fedclip.federated.secure.participant import Participant
from fedclip.federated.secure.session import Session

BINDING = b"what is trained"


@dataclass
class Signers:
    """A signing key for each client, and who knows all public ones."""

    keys: dict[str, Ed25519PrivateKey] = field(default_factory=dict)

    def of(self, site: str) -> Ed25519PrivateKey:
        if site not in self.keys:
            self.keys[site] = Ed25519PrivateKey.generate()
        return self.keys[site]

    def verify(self, site: str, message: bytes, signature: bytes) -> bool:
        try:
            self.of(site).public_key().verify(signature, message)
        except InvalidSignature:
            return False
        return True


@dataclass
class Sum:
    """A session as it goes on, and everybody in it."""

    coordinator: Aggregator
    clients: dict[str, Participant]
    length: int
    masked: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        names: list[str],
        length: int = 16,
        signers: Signers | None = None,
        nonce: str = "1",
        run: str = "run",
        server_round: int = 1,
    ) -> Sum:
        signers = signers or Signers()
        session = Session(run, server_round, nonce, tuple(sorted(names)))
        clients = {
            n: Participant(n, session, signers.of(n).sign, signers.verify) for n in session.cohort
        }
        return cls(Aggregator(session, signers.verify), clients, length)

    def keys(self, absent: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        for name, client in self.clients.items():
            if name not in absent:
                self.coordinator.add_keys(client.keys())
        self.adverts = self.coordinator.keys()

    def shares(self, absent: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        for advert in self.adverts:
            if advert.site not in absent:
                sealed = self.clients[advert.site].shares(self.adverts)
                self.coordinator.add_shares(advert.site, sealed)
        self.members = self.coordinator.settle()
        self.coordinator.bind(BINDING)

    def vectors(self, words: Mapping[str, np.ndarray]) -> None:
        for name in self.members:
            if name in words:
                sealed = self.coordinator.shares_for(name)
                self.masked[name] = self.clients[name].masked(words[name], sealed, BINDING)
                self.coordinator.add_masked(name, self.masked[name], self.length)
        self.survivors = self.coordinator.survivors()

    def unmask(self, absent: set[str] = frozenset()) -> np.ndarray:  # type: ignore[assignment]
        signatures = {}
        if self.survivors != self.members:
            for name in self.survivors:
                if name not in absent:
                    signature = self.clients[name].confirm(self.survivors)
                    self.coordinator.add_signature(name, signature)
            signatures = self.coordinator.signatures()
        for name in self.survivors:
            if name not in absent:
                shares = self.clients[name].reveal(self.survivors, signatures)
                self.coordinator.add_revealed(name, shares)
        return self.coordinator.total()
