"""What a strategy may ask a site for in a round: what leaves it, and what changes at it.

A job names the strategy; a training request that asks for more than it needs is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fedclip.catalog import STRATEGIES
from fedclip.deploy.messages.requests import Exchange
from fedclip.deploy.site.policy import Against
from fedclip.records import TrainRequest

PERSONAL = "personal"
"""Ditto's training of a personalised model, of which nothing is sent."""


class Limits(NamedTuple):
    """Groups of tensors that leave a site, and whether its frozen weights may be changed."""

    sends: frozenset[str]
    shifts: bool = False


_ALL = frozenset({"A", "B", "head", "other"})
_BY_TRAFFIC = {
    "only_b": Limits(_ALL - {"A"}),
    "b_up_both_down": Limits(_ALL - {"A"}),
    "only_a": Limits(frozenset({"A"})),
    "nothing": Limits(frozenset()),
    "stacked": Limits(_ALL, shifts=True),
    "mean_and_residual": Limits(_ALL, shifts=True),
}


def limits_of(job: Mapping[str, Any]) -> Limits | None:
    """The limits of a job's strategy; None for one that only its coordinator knows."""
    row = STRATEGIES.get(str(job.get("strategy")).partition("+")[0])
    return None if row is None else _BY_TRAFFIC.get(row.traffic.partition(":")[2], Limits(_ALL))


def check_request(job: Mapping[str, Any], request: TrainRequest, exchange: Exchange) -> None:
    """Raise Against for a training request that goes beyond the job that was taken up."""
    rounds = job["config"]["federation"]["rounds"]
    if not 1 <= request.server_round <= rounds:
        raise Against(f"round {request.server_round} is asked for, the run has {rounds} rounds")
    limits = limits_of(job)
    if limits is None:
        return
    asked = {field.group for field in exchange.answer_layout}
    allowed = frozenset[str]() if request.purpose == PERSONAL else limits.sends
    if more := sorted(asked - allowed):
        raise Against(
            f"the coordinator asks for {', '.join(more)}, which with {job['strategy']} never "
            "leaves a site"
        )
    if request.shift and not limits.shifts:
        raise Against(
            f"the coordinator changes weights of the base model, which {job['strategy']} does not"
        )
