"""Masked sums in a simulation: every client's side and the coordinator's, in one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import nan
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclip.errors import TrainingFailed
from fedclip.federated.secure.aggregator import Aggregator
from fedclip.federated.secure.fixed_point import DoesNotFit
from fedclip.federated.secure.participant import Participant
from fedclip.federated.secure.payload import Terms, mean_of, vector_of
from fedclip.federated.secure.session import Broken, Session
from fedclip.federated.update_checks import Reason, check
from fedclip.records import ClientReport, ClientUpdate, Cohort, LeftOut, TrainRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class MaskedEngine:
    """An engine whose updates are masked, summed, and unmasked as a sum.

    The protocol is that of sites on other machines, with keys of this process's own, so that what
    the strategy gets is what it would get there. It hides nothing from who owns the machine.
    """

    def __init__(
        self,
        train: Callable[[TrainRequest], Iterator[Cohort]],
        unit: int,
        largest_change: float,
    ) -> None:
        """`train` is the engine's; a client of `unit` examples weighs 1."""
        self._train = train
        self._unit, self._largest = unit, largest_change
        self._keys: dict[str, Ed25519PrivateKey] = {}

    def train(self, request: TrainRequest) -> Iterator[Cohort]:
        """Yields one cohort: the reports, without losses, and the sum."""
        try:
            yield self._sum(request)
        except Broken as error:
            raise TrainingFailed(
                f"round {request.server_round}: {error}; the last finished round is kept"
            ) from error

    def _sum(self, request: TrainRequest) -> Cohort:
        cohort = tuple(sorted(request.client_ids))
        session = Session("simulation", request.server_round, os.urandom(16).hex(), cohort)
        coordinator = Aggregator(session, self._verify)
        clients = {site: Participant(site, session, self._signer(site), self._verify)
                   for site in cohort}  # fmt: skip
        exchange_keys(coordinator, clients)
        binding = session.nonce.encode()  # one process: all are told the same
        coordinator.bind(binding)
        names, terms = sorted(request.names_sent), self._terms(request)
        reports: list[ClientReport] = []
        left_out: list[LeftOut] = []
        for update in self._updates(request, left_out):
            site = update.report.client_id
            if isinstance(words := _vector(update, request, names, terms), Reason):
                left_out.append(words.of(site))
                continue
            masked = clients[site].masked(words, coordinator.shares_for(site), binding)
            coordinator.add_masked(site, masked, terms.length(request.state, names))
            reports.append(replace(update.report, loss=nan, start_loss=nan))
        unmask(coordinator, clients)
        examples = [report.num_examples for report in reports]
        found = mean_of(coordinator.total(), request.state, names, examples, terms)
        return Cohort(tuple(reports), {}, tuple(left_out), found)

    def _updates(self, request: TrainRequest, left_out: list[LeftOut]) -> Iterator[ClientUpdate]:
        """The clients' updates, one by one, without unusable ones."""
        for cohort in self._train(request):
            left_out += cohort.left_out
            yield from cohort.updates()

    def _terms(self, request: TrainRequest) -> Terms:
        return Terms(len(request.client_ids), self._unit, self._largest)

    def _signer(self, site: str) -> Callable[[bytes], bytes]:
        if site not in self._keys:
            self._keys[site] = Ed25519PrivateKey.generate()
        return self._keys[site].sign

    def _verify(self, site: str, message: bytes, signature: bytes) -> bool:
        try:
            self._keys[site].public_key().verify(signature, message)
        except InvalidSignature:
            return False
        return True


def exchange_keys(coordinator: Aggregator, clients: dict[str, Participant]) -> None:
    """The first two steps, of clients in this process."""
    for client in clients.values():
        coordinator.add_keys(client.keys())
    adverts = coordinator.keys()
    for site, client in clients.items():
        coordinator.add_shares(site, client.shares(adverts))
    coordinator.settle()


def unmask(coordinator: Aggregator, clients: dict[str, Participant]) -> None:
    """The last steps, of those clients whose vectors are in the sum."""
    survivors = coordinator.survivors()
    signatures: dict[str, bytes] = {}
    if survivors != coordinator.members:
        for site in survivors:
            coordinator.add_signature(site, clients[site].confirm(survivors))
        signatures = coordinator.signatures()
    for site in survivors:
        coordinator.add_revealed(site, clients[site].reveal(survivors, signatures))


def _vector(
    update: ClientUpdate, request: TrainRequest, names: list[str], terms: Terms
) -> NDArray[np.uint32] | Reason:
    """A client's vector, or why it has none."""
    if (reason := check(update, request)) is not None:
        return reason
    report = update.report
    start = request.start(report.client_id)
    try:
        return vector_of(update.tensors, start, names, report.num_examples, report.loss, terms)
    except DoesNotFit as error:
        return too_large(error)


def too_large(error: DoesNotFit) -> Reason:
    """Why a client's update is not in a sum."""
    words = (
        f"changes a number by too much for a masked sum: the change {error}; a lower "
        "client.learning_rate, or a higher secure.largest_change, which is less exact, may help"
    )
    return Reason("range", words, error.figure)
