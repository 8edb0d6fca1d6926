"""Training of which every request is noted in the ledger before it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Protocol

from fedclip.errors import UsageError
from fedclip.federated.privacy.ledger import request_sha256
from fedclip.records import Cohort, TrainRequest


class Refused(UsageError):
    """What a strategy asks for cannot be had with privacy."""


class Charged(Protocol):
    """Books that note what a request takes before it is trained."""

    def charge(self, request: TrainRequest, steps: Mapping[str, int]) -> None:
        """Note it, or raise BudgetSpent."""
        ...


class ChargedEngine:
    """An engine that trains by DP-SGD, behind the books."""

    def __init__(
        self,
        train: Callable[[TrainRequest], Iterator[Cohort]],
        ledger: Charged,
        steps: Mapping[str, int],
    ) -> None:
        """`train` is the engine's; `steps` counts each client's steps in a request."""
        self._train = train
        self._ledger = ledger
        self._steps = steps

    def train(self, request: TrainRequest) -> Iterator[Cohort]:
        """Trains the request's clients once their steps are in the books."""
        refuse(request)
        request = with_digest(request)
        self._ledger.charge(request, {c: self._steps[c] for c in request.client_ids})
        yield from self._train(request)


def with_digest(request: TrainRequest) -> TrainRequest:
    """The request with the digest that names its draws."""
    return replace(request, digest=request_sha256(request))


def refuse(request: TrainRequest) -> None:
    """Refuse requests of what DP-SGD does not hide, or would fill with noise."""
    reasons = {
        "reads each client's exact loss (start_loss)": request.start_loss,
        "corrects gradients by what clients told (offsets)": bool(request.offsets),
        "has clients train at ranks of their own (ranks)": bool(request.ranks),
        "cuts factors (cut)": bool(request.cut),
    }
    for what in (what for what, asked in reasons.items() if asked):
        raise Refused(
            f"federation.strategy: it {what}, which does not go with privacy.unit: example; use "
            "another strategy, such as ffa, fedsvd or fedavg"
        )
