"""The figures that a run ends with, as `summary.json` holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from fedclip.evaluation.metrics import CLASS_FIGURES, chosen
from fedclip.experiment.checkpoint import Checkpoint
from fedclip.experiment.class_coverage import Coverage
from fedclip.experiment.context import RunContext
from fedclip.experiment.evaluate import evaluate_matrix, evaluate_unseen
from fedclip.experiment.identity import PACKAGES
from fedclip.experiment.round_records import ZERO_SHOT
from fedclip.experiment.strategy import is_personal
from fedclip.models.clip import adapter_sha256
from fedclip.records import RunState, State

FLOWER = "flower"
"""The `engine` of a coordinator's run."""
_OF_THE_LAST = frozenset(
    {"adapters", "groups", "forgetting", "base_accuracy", "base_zero_shot_accuracy"}
    | {"new_accuracy", "new_zero_shot_accuracy", "harmonic_mean", "zero_shot_harmonic_mean"}
    | {"adapter_sha256", "state_sha256", "summary_sha256", "records_sha256", "stopped_by"}
)
BACKDOOR = "backdoor_success"
"""Of a run with a backdoor, in its lines and its summary."""
_RETRIEVAL = ("zero_shot_retrieval", "retrieval")  # of the first line, and of the last


def summarise(
    context: RunContext,
    checkpoint: Checkpoint,
    metrics: list[dict[str, Any]],
    coverage: Coverage | None,
) -> dict[str, Any]:
    """All of `summary.json` but the seconds, of the lines of `metrics.jsonl`."""
    config, counts, last = context.config, context.model.get_model_summary(), metrics[-1]
    # A private run does not tell who took part: it has as many trainings as are expected.
    trainings = sum(len(line.get("clients", ())) for line in metrics)
    trainings = trainings or max(1, checkpoint.finished_rounds * context.clients_per_round)
    state = checkpoint.state
    retrieval = {key: line[key] for line in metrics for key in _RETRIEVAL if key in line}
    return {
        "task": config.task,
        "model": config.model.model_name,
        "data": ", ".join(config.tasks) if context.several else config.data.name,
        "strategy": config.federation.strategy,
        "engine": config.engine.name if context.sites is None else FLOWER,
        "seed": config.seed,
        "rounds": checkpoint.finished_rounds,
        "stopped_by": last.get("stopped_by"),
        "clients": len(context.sites or metrics[0].get("accuracy_by_client", context.clients)),
        "clients_per_round": context.clients_per_round,
        "zero_shot_accuracy": metrics[0]["zero_shot_accuracy"],
        "initial_accuracy": metrics[0]["accuracy"],
        "accuracy": last["accuracy"],
        "test_examples": last.get("test_examples"),
        "personal": is_personal(config),
        "validation_accuracy": last.get("validation_accuracy"),
        "validation_loss": last.get("validation_loss"),  # not in lines of older versions
        "client_accuracy": last.get("client_accuracy"),
        **_worst_site(last),
        **_class_figures(metrics),
        **{key: last[key] for key in (BACKDOOR,) if key in last},
        "best": _best(checkpoint, metrics),
        "base_parameters": counts["base_parameters"],
        "total_parameters": counts["total_parameters"],
        "trainable_parameters": counts["trainable_parameters"],
        "bytes_up_per_client_round": checkpoint.bytes_up / trainings,
        "bytes_down_per_client_round": checkpoint.bytes_down / trainings,
        "device": str(context.device),
        "precision": context.precision,
        "input_size": context.model.image_size,
        "shrunk": context.shrunk,
        "bad_images": context.bad_images,
        **({} if coverage is None else coverage.record()),
        "adapter_sha256": adapter_sha256(_adapters(state)),
        "state_sha256": adapter_sha256(state.flat()),
        "versions": {name: version(name) for name in PACKAGES},
        **retrieval,
        **_further_metrics(context, metrics),
        **({"groups": _groups(state)} if state.groups else {}),
        **_elsewhere(context, state, metrics),
    }


def _elsewhere(
    context: RunContext, state: RunState, metrics: list[dict[str, Any]]
) -> dict[str, Any]:
    """Figures by task, or on classes and data that were not trained on."""
    if context.several:
        return _tasks(context, state, metrics)
    seen = (metrics[0]["zero_shot_accuracy"], metrics[-1]["accuracy"])
    return evaluate_unseen(context, state, seen)


def _best(checkpoint: Checkpoint, metrics: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The best round by validation, with its accuracy on the test set."""
    best = checkpoint.best
    return best and best | {"accuracy": metrics[best["server_round"]]["accuracy"]}


def as_of_best(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of a run as if it had ended with its best round, from the lines of its rounds.

    What was measured of the last round alone is left out.
    """
    number = summary["best"]["server_round"]
    line, chosen_names = metrics[number], summary.get("metrics", ())
    keys = ("accuracy", *chosen_names)
    keys = (*keys, *(f"{place}_{key}" for place in ("validation", "client") for key in keys))
    found = {key: value for key, value in summary.items() if key not in _OF_THE_LAST}
    for key in (*keys, *CLASS_FIGURES, "retrieval", "validation_loss", BACKDOOR):
        if key in found:
            found[key] = line.get(key)
    found |= _worst_site(line)
    tasks = {}
    for task, own in summary.get("tasks", {}).items():
        by_task = {key: line.get(f"{key}_by_task", {}).get(task) for key in own}
        tasks[task] = own | {key: by_task[key] for key in (*keys, *CLASS_FIGURES) if key in own}
    return found | ({"tasks": tasks} if tasks else {}) | {"rounds": number}


def _worst_site(line: Mapping[str, Any]) -> dict[str, Any]:
    """The client of the lowest accuracy on its own test set, where several have one."""
    told = line.get("accuracy_by_client") or {}
    by_client = {name: own for name, own in told.items() if own is not None}
    if len(by_client) < 2:
        return {}
    name = min(by_client, key=lambda client: (by_client[client], client))
    return {"worst_site": {"name": name, "accuracy": by_client[name]}}


def _class_figures(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures by class, of the base model and the last; nothing of a run on captions."""
    first, last = metrics[0], metrics[-1]
    before = {f"zero_shot_{name}": first.get(f"zero_shot_{name}") for name in ZERO_SHOT}
    found = {name: last[name] for name in CLASS_FIGURES if name in last}
    return (before | found) if found else {}


def _further_metrics(context: RunContext, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of `evaluation.metrics`, under keys like those of accuracy; nothing without any."""
    names, first, last = list(chosen(context.config.evaluation.metrics)), metrics[0], metrics[-1]
    found: dict[str, Any] = {"metrics": names} if names else {}
    for name in names:
        found[f"zero_shot_{name}"] = first[f"zero_shot_{name}"]
        found[f"initial_{name}"] = first[name]
        found |= {key: last.get(key) for key in (name, f"validation_{name}", f"client_{name}")}
    return found


def _adapters(state: RunState) -> State:
    """What the run has learned: the shared tensors, or those of every group."""
    if not state.groups:
        return state.shared
    return {f"{g}/{n}": t for g, own in state.groups.items() for n, t in own.shared.items()}


def _groups(state: RunState) -> dict[str, list[str]]:
    """The clients of every group."""
    return {g: sorted(c for c, own in state.member_of.items() if own == g) for g in state.groups}


def _tasks(
    context: RunContext, state: RunState, metrics: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Figures of each task, and of every adapter on every task."""
    first, last = metrics[0], metrics[-1]
    names = ("accuracy", *chosen(context.config.evaluation.metrics))
    tasks = {
        task: {"clients": len(own.clients)}
        | {
            key: line[f"{figure}_by_task"][task]
            for name in names
            for key, line, figure in (
                (f"zero_shot_{name}", first, name),
                (name, last, name),
                (f"validation_{name}", last, f"validation_{name}"),
            )
        }
        | {key: last[f"{key}_by_task"][task] for key in CLASS_FIGURES}
        for task, own in context.by_task().items()
    }
    return {"tasks": tasks, "adapters": evaluate_matrix(context, state)}
