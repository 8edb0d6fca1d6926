"""The records of rounds, as `metrics.jsonl` holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedclip.evaluation.metrics import chosen
from fedclip.experiment.context import RunContext
from fedclip.experiment.evaluate import evaluate_run
from fedclip.federated.rounds import RoundResult
from fedclip.records import RunState

Judge = Callable[[RoundResult], Mapping[str, Any]]
"""Gives figures of the last round, where the clients' tests are elsewhere."""
ZERO_SHOT = ("macro_f1", "worst_class")
"""Figures by class of which the base model's stand beside the trained one's."""


def before_training(context: RunContext, state: RunState, personal: bool) -> dict[str, Any]:
    """Round 0: the untrained model, and the base model with CLIP's zero-shot classifier."""
    figures = evaluate_run(context, state, personal=personal)
    base = figures
    if "retrieval" in figures:
        figures["zero_shot_retrieval"] = figures["retrieval"]
    if context.model.head != "text":
        base = evaluate_run(context, state, base=True, personal=personal)
    names = ["accuracy", *chosen(context.config.evaluation.metrics)]
    names += [name for name in ZERO_SHOT if name in base]
    return {"server_round": 0} | {f"zero_shot_{name}": base[name] for name in names} | figures


def round_record(result: RoundResult) -> dict[str, Any]:
    """What a round's training tells; `seconds_by_client` goes to `timing.jsonl`.

    Of clients that were left out it has who, the kind of fault, why, and a figure if there is one;
    of a robust rule or a cap the weights.
    """
    faults = [
        {"client": one.client_id, "kind": one.kind, "reason": one.reason, "figure": one.figure}
        for one in result.left_out
    ]
    told = {"left_out": faults, "weights": dict(result.weights)}
    of_step = {"learning_rate": result.learning_rate, "update_norm": result.update_norm}
    known = {key: value for key, value in of_step.items() if value is not None}
    return (
        {key: value for key, value in told.items() if value}
        | known
        | {
            "server_round": result.server_round,
            "loss": result.loss,
            "num_examples": sum(r.num_examples for r in result.reports),
            "bytes_up": result.bytes_up,
            "bytes_down": result.bytes_down,
            "clients": {r.client_id: {"loss": r.loss, "steps": r.steps} for r in result.reports},
            "seconds_by_client": {r.client_id: r.seconds for r in result.reports},
        }
    )


def figures_of(
    context: RunContext,
    result: RoundResult,
    personal: bool,
    due: bool,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """A round's figures: evaluated here where that is due, and told by a judge, if there is one."""
    figures = evaluate_run(context, result.state, personal=personal) if due else {}
    return figures | dict(judge(result) if judge is not None else {})
