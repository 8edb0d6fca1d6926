"""Sanity checks of client updates: what an aggregation may take in.

One function, `check`, for every engine and for every message of a remote site. The comparison of a
cohort's sizes, `outliers`, needs all updates of a round at once; remote sites alone face it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal, NamedTuple

from fedclip.errors import TrainingFailed
from fedclip.records import ClientUpdate, Cohort, State, TrainRequest

ADVICE = "a lower client.learning_rate or precision: fp32 may help"
"""What a message about numbers that are not finite ends with."""


@dataclass(frozen=True)
class Reason:
    """Why an update is not taken; `words` go on from the client's name or a colon after it."""

    kind: Literal["names", "shape", "dtype", "finite"]
    words: str


def check(update: ClientUpdate, request: TrainRequest) -> Reason | None:
    """Why a client's update must not be aggregated; None where it may.

    It holds what the request asked for (all tensors that are sent, and none but trained ones), in
    the shapes and formats of the request's state, and all its numbers are finite, those of the
    report too where the request asks for them.
    """
    return _misfit(update.tensors, request) or _not_finite_report(update, request)


def require_sound(cohort: Cohort, request: TrainRequest) -> None:
    """Raise TrainingFailed, naming the client, if an update of the cohort is not to be taken."""
    for update in cohort.updates():
        reason = check(update, request)
        if reason is not None:
            advice = f"; {ADVICE}" if reason.kind == "finite" else ""
            raise TrainingFailed(
                f"client {update.report.client_id}, round {request.server_round}: "
                f"{reason.words}{advice}"
            )


def not_finite(loss: float, tensors: State) -> Reason | None:
    """The reason of training that has diverged: a loss or a tensor with NaN or infinity."""
    if not math.isfinite(loss):
        return Reason("finite", f"the loss became {loss}")
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            return Reason("finite", f"sends values that are not finite (NaN or infinity): {name}")
    return None


class Outlier(NamedTuple):
    """An update's norm, and how many times it is what is usual."""

    norm: float
    times: float


def outliers(norms: Mapping[str, float], limit: float, usual: float | None) -> dict[str, Outlier]:
    """Updates, by client, whose norm is more than `limit` times what others have.

    Each is compared with the median of the others, a single one with `usual`, if there is one.
    """
    found = {}
    for client_id, norm in norms.items():
        others = [other for name, other in norms.items() if name != client_id]
        normal = median(others) if others else usual
        if normal is not None and norm > limit * normal > 0:
            found[client_id] = Outlier(norm, norm / normal)
    return found


def _misfit(tensors: State, request: TrainRequest) -> Reason | None:
    """Names, shapes and formats that are not those of the request."""
    trained = request.state.keys() if request.trained is None else request.trained
    if extra := sorted(tensors.keys() - trained):
        return Reason("names", f"sends {extra[0]}, which was not asked for")
    if missing := sorted(request.names_sent - tensors.keys()):
        return Reason("names", f"does not send {missing[0]}")
    for name, tensor in tensors.items():
        wanted = request.state[name]
        if tensor.shape != wanted.shape:
            sizes = f"{list(tensor.shape)}, {list(wanted.shape)} was asked for"
            return Reason("shape", f"sends {name} in the shape {sizes}")
        if tensor.dtype != wanted.dtype:
            formats = f"{_short(tensor.dtype)}, {_short(wanted.dtype)} was asked for"
            return Reason("dtype", f"sends {name} in {formats}")
    return None


def _not_finite_report(update: ClientUpdate, request: TrainRequest) -> Reason | None:
    report = update.report
    used = {"start_loss": report.start_loss} if request.start_loss else {}
    if request.start_loss or report.client_id in request.offsets:  # q-FedAvg, SCAFFOLD divide by it
        used["rate_sum"] = report.rate_sum
    for key, number in used.items():
        if not math.isfinite(number):
            return Reason("finite", f"sends a {key} that is not finite: {number}")
    return not_finite(report.loss, update.tensors)


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
