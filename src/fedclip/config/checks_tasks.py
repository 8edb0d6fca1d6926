"""Checks of several tasks in one federation, and of who shares an adapter with whom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedclip.catalog import strategy_row
from fedclip.config.section import CrossProblem

if TYPE_CHECKING:
    from fedclip.config.tree import Config


def task_views(config: Config) -> Iterator[tuple[str, Config]]:
    """By task, the configuration as if its data were the only ones."""
    for name, own in config.tasks.items():
        federation = config.federation
        if own.num_clients is not None:
            # The draw of a round is from the clients of all tasks.
            federation = federation.model_copy(update={"clients_per_round": None})
        yield name, config.model_copy(update={"data": own, "federation": federation})


def task_problems(config: Config) -> Iterator[CrossProblem]:
    """What several tasks do not go with."""
    tasks, model, strategy = config.tasks, config.model, config.federation.strategy
    if len(tasks) == 1:
        yield CrossProblem(
            "tasks", f"tasks names one task, {next(iter(tasks))}; name two or more, or use data"
        )
    if reason := model.no_lora:
        yield CrossProblem("tasks", f"tasks share adapters, but {reason}; train an adapter")
    lower = [name.lower() for name in tasks]
    if twins := [name for name in tasks if lower.count(name.lower()) > 1]:
        yield CrossProblem(
            f"tasks.{twins[0]}",
            f"tasks.{twins[0]}: another task is called so but for case, and their folders may be "
            "one; rename it",
        )
    if model.head == "linear" or model.num_classes is not None:
        key = "head" if model.head == "linear" else "num_classes"
        yield CrossProblem(
            f"model.{key}",
            f"model.{key} makes one linear classifier, but every task has classes of its own; use "
            "model.head: text, and leave model.num_classes out",
        )
    if config.task == "contrastive":
        yield CrossProblem(
            "tasks",
            "tasks are told apart by classes, but task is contrastive; leave one of them out",
        )
    if strategy_row(strategy).pools:
        yield CrossProblem(
            "federation.strategy",
            f"federation.strategy: {strategy} has one client, which belongs to no task; run it on "
            "each task's data alone",
        )
    if config.evaluation.other_data:
        yield CrossProblem(
            "evaluation.other_data",
            "evaluation.other_data is for one task; with several, every adapter is measured on "
            "every task; leave it out",
        )
    for key in (f"tasks.{n}.train_classes" for n, own in tasks.items() if own.train_classes):
        yield CrossProblem(
            key,
            f"{key}: base-to-new is measured with one task only; leave it out, or use data instead "
            "of tasks",
        )


def sharing_problems(config: Config) -> Iterator[CrossProblem]:
    """What the ways of sharing need, whatever the strategy."""
    federation, sharing = config.federation, config.federation.sharing
    mode, where = sharing.mode, "federation.sharing.mode"
    for key, owner, given in (
        ("shared_rank", "shared+task", sharing.shared_rank),
        ("clusters", "clusters", sharing.clusters),
    ):
        if given is not None and mode != owner:
            yield CrossProblem(
                f"federation.sharing.{key}",
                f"federation.sharing.{key} belongs to {where}: {owner}; the mode is {mode}",
                (where,),
            )
    if mode == "shared":
        return
    named = f"{where}: {mode}"
    if mode != "clusters" and not config.tasks:
        text = f"{named} needs several tasks; name them under tasks"
        yield CrossProblem(where, text, ("tasks",))
    if reason := config.model.no_lora:
        yield CrossProblem(where, f"{named} needs an adapter, but {reason}")
    if federation.ditto_mu is not None:
        yield one_model_each(mode, "federation.ditto_mu")
    if config.model.lora.use_dora:
        yield CrossProblem(
            where,
            f"{named} ends with a merge of adapters, which DoRA's are not fit for; leave "
            "model.lora.use_dora out",
        )
    if mode == "per_task":
        return
    others = {
        "federation.scaffold": federation.scaffold,
        "federation.dynamic_ranks.enabled": federation.dynamic_ranks.enabled,
        "federation.server_optimizer.name": federation.server_optimizer.name != "none",
    }
    for key in (key for key, given in others.items() if given):
        yield CrossProblem(where, f"{named} does not go with {key}; leave one of them out")
    r, found, rounds = config.model.lora.r, sharing.cluster_round, federation.rounds
    if mode == "shared+task" and (r < 2 or (sharing.shared_rank or 1) >= r):
        yield CrossProblem(
            "federation.sharing.shared_rank",
            f"{named} divides model.lora.r ({r}) in a shared part and one for each task; "
            "federation.sharing.shared_rank must be less than it, and model.lora.r at least 2",
            ("model.lora.r",),
        )
    if mode == "clusters" and found >= rounds:
        yield CrossProblem(
            "federation.sharing.cluster_round",
            f"federation.sharing.cluster_round ({found}) must come before the last round "
            f"(federation.rounds: {rounds}), or the groups would not be trained",
            ("federation.rounds",),
        )


def one_model_each(mode: str, what: str) -> CrossProblem:
    """Groups of clients exclude personalised models."""
    return CrossProblem(
        "federation.sharing.mode",
        f"federation.sharing.mode: {mode} makes a model for each group of clients, {what} one for "
        "each client; use one of the two",
    )
