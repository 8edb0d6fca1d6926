"""Checks of several tasks in one federation, and of who shares an adapter with whom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedclip.catalog import strategy_row
from fedclip.config.model import no_lora
from fedclip.config.section import CrossProblem, lookup, number


def task_views(values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """By task, the configuration as if its data were the only ones."""
    tasks, common = lookup(values, "tasks"), lookup(values, "data")
    for name, own in tasks.items() if isinstance(tasks, Mapping) else ():
        if isinstance(own, Mapping) and isinstance(common, Mapping):
            data = {**common, **own}
            federation = lookup(values, "federation")
            if isinstance(federation, Mapping) and own.get("num_clients") is not None:
                # The draw of a round is from the clients of all tasks.
                federation = {**federation, "clients_per_round": None}
            yield str(name), {**values, "data": data, "federation": federation}


def task_problems(values: Mapping[str, Any]) -> Iterator[CrossProblem]:
    """What several tasks do not go with."""
    tasks = lookup(values, "tasks")
    if not isinstance(tasks, Mapping):
        return
    if len(tasks) == 1:
        yield CrossProblem(
            "tasks", f"tasks names one task, {next(iter(tasks))}; name two or more, or use data"
        )
    if reason := no_lora(values):
        yield CrossProblem("tasks", f"tasks share adapters, but {reason}; train an adapter")
    lower = [str(name).lower() for name in tasks]
    for name in (str(name) for name in tasks if lower.count(str(name).lower()) > 1):
        yield CrossProblem(
            f"tasks.{name}",
            f"tasks.{name}: another task is called so but for case, and their folders may be one; "
            "rename it",
        )
        break
    if lookup(values, "model.head") == "linear" or number(values, "model.num_classes") is not None:
        key = "head" if lookup(values, "model.head") == "linear" else "num_classes"
        yield CrossProblem(
            f"model.{key}",
            f"model.{key} makes one linear classifier, but every task has classes of its own; use "
            "model.head: text, and leave model.num_classes out",
        )
    if lookup(values, "task") == "contrastive":
        yield CrossProblem(
            "tasks",
            "tasks are told apart by classes, but task is contrastive; leave one of them out",
        )
    strategy = lookup(values, "federation.strategy")
    if isinstance(strategy, str) and strategy_row(strategy).pools:
        yield CrossProblem(
            "federation.strategy",
            f"federation.strategy: {strategy} has one client, which belongs to no task; run it on "
            "each task's data alone",
        )
    if lookup(values, "evaluation.other_data"):
        yield CrossProblem(
            "evaluation.other_data",
            "evaluation.other_data is for one task; with several, every adapter is measured on "
            "every task; leave it out",
        )
    for name, view in task_views(values):
        if lookup(view, "data.train_classes") is not None:
            yield CrossProblem(
                f"tasks.{name}.train_classes",
                f"tasks.{name}.train_classes: base-to-new is measured with one task only; leave it "
                "out, or use data instead of tasks",
            )


def sharing_problems(values: Mapping[str, Any]) -> Iterator[CrossProblem]:
    """What the ways of sharing need, whatever the strategy."""
    mode = lookup(values, "federation.sharing.mode")
    for key, owner in (
        ("shared_rank", "shared+task"),
        ("clusters", "clusters"),
    ):
        if number(values, f"federation.sharing.{key}") is not None and mode != owner:
            yield CrossProblem(
                f"federation.sharing.{key}",
                f"federation.sharing.{key} belongs to federation.sharing.mode: {owner}; the mode "
                f"is {mode}",
            )
    if mode not in ("per_task", "shared+task", "clusters"):
        return
    where, named = "federation.sharing.mode", f"federation.sharing.mode: {mode}"
    if mode != "clusters" and not lookup(values, "tasks"):
        yield CrossProblem(where, f"{named} needs several tasks; name them under tasks")
    if reason := no_lora(values):
        yield CrossProblem(where, f"{named} needs an adapter, but {reason}")
    if number(values, "federation.ditto_mu") is not None:
        yield one_model_each(mode, "federation.ditto_mu")
    if lookup(values, "model.lora.use_dora") is True:
        yield CrossProblem(
            where,
            f"{named} ends with a merge of adapters, which DoRA's are not fit for; leave "
            "model.lora.use_dora out",
        )
    if mode == "per_task":
        return
    others = {
        "federation.scaffold": lookup(values, "federation.scaffold") is True,
        "federation.dynamic_ranks.enabled": lookup(values, "federation.dynamic_ranks.enabled")
        is True,
        "federation.server_optimizer.name": lookup(values, "federation.server_optimizer.name")
        not in (None, "none"),
    }
    for key in (key for key, given in others.items() if given):
        yield CrossProblem(where, f"{named} does not go with {key}; leave one of them out")
    r, shared = number(values, "model.lora.r"), number(values, "federation.sharing.shared_rank")
    if mode == "shared+task" and r is not None and (r < 2 or (shared or 1) >= r):
        yield CrossProblem(
            "federation.sharing.shared_rank",
            f"{named} divides model.lora.r ({r}) in a shared part and one for each task; "
            "federation.sharing.shared_rank must be less than it, and model.lora.r at least 2",
        )
    found, rounds = (
        number(values, "federation.sharing.cluster_round"),
        number(values, "federation.rounds"),
    )
    if mode == "clusters" and found is not None and rounds is not None and found >= rounds:
        yield CrossProblem(
            "federation.sharing.cluster_round",
            f"federation.sharing.cluster_round ({found}) must come before the last round "
            f"(federation.rounds: {rounds}), or the groups would not be trained",
        )


def one_model_each(mode: str, what: str) -> CrossProblem:
    """Groups of clients exclude personalised models."""
    return CrossProblem(
        "federation.sharing.mode",
        f"federation.sharing.mode: {mode} makes a model for each group of clients, {what} one for "
        "each client; use one of the two",
    )
