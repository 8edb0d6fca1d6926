"""Sanity checks of client updates: what an aggregation may take in, and what it may give.

One function, `check`, for every engine and for every message of a remote site. The comparison of a
cohort's sizes, `outliers`, needs all updates of a round at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from fedclip.errors import TrainingFailed, UsageError, shortened
from fedclip.records import ClientReport, ClientUpdate, Cohort, LeftOut, State, TrainRequest

ADVICE = "a lower client.learning_rate or precision: fp32 may help"
"""What a message about numbers that are not finite ends with."""


@dataclass(frozen=True)
class Reason:
    """Why an update is not taken; `words` go on from the client's name or a colon after it.

    `kind` is one word for it: names, shape, dtype, finite, range, examples, size, ...
    """

    kind: str
    words: str
    figure: float | None = None

    def of(self, client_id: str) -> LeftOut:
        """The record of a client that is left out for it."""
        return LeftOut(client_id, self.kind, self.words, self.figure)


class Bounds(NamedTuple):
    """What a number that a client tells may be."""

    least: float
    most: float
    whole: bool = False


BOUNDS = {
    "num_examples": Bounds(1, 1e9, whole=True),
    "steps": Bounds(1, 1e12, whole=True),
    "loss": Bounds(0, 1e6),
    "start_loss": Bounds(0, 1e6),
    "rate_sum": Bounds(0, 1e12),
    "seconds": Bounds(0, 1e9),
    "epsilon": Bounds(0, 1e9),
    "tests": Bounds(0, 1e9, whole=True),
    "correct": Bounds(0, 1e9, whole=True),
}
"""Every number of a report or a message's header. JSON has numbers of any length."""


def number_fault(key: str, value: Any) -> Reason | None:
    """Why a client's number is none that can be: of the wrong kind, not finite, out of bounds."""
    least, most, whole = BOUNDS[key]
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    # Comparisons take whole numbers of any length, which conversions to float do not.
    if is_number and least <= value <= most:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return Reason("finite", f"sends a {key} that is not finite: {value}")
    wanted = f"a {'whole ' if whole else ''}number from {least:g} to {most:g}"
    figure = float(value) if is_number and abs(value) < 1e300 else None
    return Reason("range", f"{key} must be {wanted}, got {shortened(value)}", figure)


def check(update: ClientUpdate, request: TrainRequest) -> Reason | None:
    """Why a client's update must not be aggregated; None where it may.

    It holds what the request asked for (all tensors that are sent, and none but trained ones), in
    the shapes and formats of the request's state, and all numbers are finite. The report's are
    within their bounds; those that the request does not need may be unknown. The client has as many
    examples as were agreed.
    """
    return (
        _misfit(update.tensors, request)
        or report_fault(update.report, request)
        or not_finite(update.tensors)
    )


def require_sound(cohort: Cohort, request: TrainRequest) -> ClientUpdate:
    """The one update of a cohort; TrainingFailed, naming the client, if it is not to be taken."""
    left_out = list(cohort.left_out)
    for update in cohort.updates():
        if (reason := check(update, request)) is None:
            return update
        left_out.append(reason.of(update.report.client_id))
    raise TrainingFailed(told(left_out, request.server_round))


def told(left_out: list[LeftOut], server_round: int) -> str:
    """The clients that a round is without, and why, in a line."""
    faults = [f"client {one.client_id}, round {server_round}: {one.reason}" for one in left_out]
    return "; ".join(faults) + (f"; {ADVICE}" * any(one.kind == "finite" for one in left_out))


def not_finite(tensors: State) -> Reason | None:
    """The reason of training that has diverged: a tensor with NaN or infinity."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            return Reason("finite", f"sends values that are not finite (NaN or infinity): {name}")
    return None


def require_finite(tensors: State, what: str, server_round: int) -> None:
    """Raise UsageError if an aggregation gave numbers that no checkpoint may hold."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UsageError(
                f"round {server_round}: {what} gives values that are not finite (NaN or infinity) "
                f"for {name}, though all updates were; the last finished round is kept. A lower "
                "client.learning_rate may help, or federation.clients_per_round without the client "
                "whose update is too large"
            )


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
        return Reason("names", f"sends {shortened(extra[0])}, which was not asked for")
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


def report_fault(report: ClientReport, request: TrainRequest) -> Reason | None:
    """A number of the report that cannot be, or that is not what was agreed."""
    divides = request.start_loss or report.client_id in request.offsets  # q-FedAvg, SCAFFOLD
    unneeded = {"start_loss": not request.start_loss, "rate_sum": not divides}
    unneeded |= {"loss": report.epsilon is not None}
    for key in ("num_examples", "loss", "steps", "seconds", "rate_sum", "start_loss"):
        value = getattr(report, key)
        unknown = unneeded.get(key, False) and isinstance(value, float) and math.isnan(value)
        if not unknown and (fault := number_fault(key, value)) is not None:
            return fault
    agreed = request.examples.get(report.client_id, report.num_examples)
    if report.num_examples != agreed:
        said = f"said {agreed} when it came; its data have changed"
        words = said if agreed else "said none that can be when it came"
        words = f"now has {report.num_examples} examples, and {words}"
        return Reason("examples", words, report.num_examples)
    return _steps_fault(report, request, divides)


def _steps_fault(report: ClientReport, request: TrainRequest, divides: bool) -> Reason | None:
    """More steps than planned, or a sum of rates that they cannot have; fp16 leaves steps out."""
    plan, steps = request.plan, report.steps
    if plan is None:
        return None
    if steps > (most := plan.most_steps(report.num_examples)):
        return Reason("range", f"has taken {steps} steps; {most} were asked for", steps)
    if not divides or report.rate_sum == 0:
        return None
    least, largest = plan.rate((steps - 1) / steps) * (1 - 1e-6), steps * plan.rate(0) * (1 + 1e-6)
    if least <= report.rate_sum <= largest:
        return None
    return Reason(
        "range",
        f"sends a rate_sum of {report.rate_sum:g}; {steps} steps have one from {least:.3g} to "
        f"{largest:.3g}, or 0",
        report.rate_sum,
    )


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
