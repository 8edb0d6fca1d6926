"""Masked sums of a run: what they are refused for, who makes them, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedclip.config.secure import LEAST_MASKED, few
from fedclip.errors import UsageError
from fedclip.experiment.context import RunContext
from fedclip.federated.rounds import Engine
from fedclip.federated.secure.updates import Hidden, SummedUpdates
from fedclip.federated.strategies import Strategy
from fedclip.federated.updates import Updates
from fedclip.records import ClientReport, Cohort, RunState, SecureSum, TrainRequest


def check_secure(context: RunContext, choose: Callable[[RunContext], Strategy]) -> None:
    """Refuse what cannot be had behind masks, before anything is written.

    A strategy that `choose` makes is asked for a round without training, to learn what it reads.
    """
    if not context.config.secure.masked:
        return
    from fedclip.federated.secure import ciphers  # noqa: F401  # says which package is missing

    if context.processes.count > 1:
        raise UsageError("secure.aggregation: a masked run is one process; leave torchrun out")
    if context.clients_per_round < LEAST_MASKED:
        raise UsageError(few("clients of a round", context.clients_per_round))
    state = context.model.get_parameters()
    ids = tuple(sorted(context.clients))[:LEAST_MASKED]
    reports = tuple(ClientReport(c, 1, 1.0, 1, 0.0) for c in ids)

    def train(request: TrainRequest) -> Updates:
        means = {n: request.state[n] for n in request.names_sent}
        return SummedUpdates(request, [Cohort(reports, {}, (), SecureSum(means, 1.0))])

    try:
        choose(context).round(RunState(state), TrainRequest(1, ids, state), train)
    except Hidden:
        raise
    except Exception:
        pass  # what only such updates run into; the first round tells of what real ones do


def masked_engine(context: RunContext, engine: Engine) -> Engine:
    """The engine, whose updates are masked where the configuration asks for it."""
    secure = context.config.secure
    if not secure.masked:
        return engine
    from fedclip.federated.secure.simulated import MaskedEngine

    return MaskedEngine(engine.train, weight_unit(context), secure.largest_change)


def weight_unit(context: RunContext) -> int:
    """The number of examples by which a client weighs 1, the most that it can."""
    largest = max(context.clients.values(), default=1)
    return max(1, min(largest, context.config.secure.most_examples or largest))


def in_words(context: RunContext) -> str | None:
    """What a run says of its masks; None where it has none."""
    if not context.config.secure.masked:
        return None
    from fedclip.federated.secure.session import threshold

    clients = context.clients_per_round
    return (
        f"masked sums: of the {clients} clients of a round, {threshold(clients)} must stay to its "
        "end; single updates and losses are not seen, so none is left out for its size "
        "(deploy.largest_update)"
    )


def record_of(context: RunContext) -> dict[str, Any]:
    """What the summary says of it."""
    if not context.config.secure.masked:
        return {}
    from fedclip.federated.secure.session import threshold

    return {"secure": {"aggregation": "masked", "threshold": threshold(context.clients_per_round)}}
