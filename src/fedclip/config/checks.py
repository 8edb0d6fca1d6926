"""Checks that concern more than one key of a configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedclip.config.checks_data import (
    CLIENT_KEYS,
    caption_problems,
    may_be_natural,
    rank_sources,
)
from fedclip.config.checks_privacy import privacy_problems
from fedclip.config.checks_strategy import named_strategy_problems
from fedclip.config.checks_tasks import sharing_problems, task_problems, task_views
from fedclip.config.section import CrossProblem

if TYPE_CHECKING:
    from fedclip.config.tree import Config


def cross_problems(config: Config) -> list[CrossProblem]:
    """Say what does not fit together in a configuration whose single keys are valid."""
    problems = [problem for check in CHECKS for problem in check(config)]
    if not config.tasks:
        found = (problem for check in DATA_CHECKS for problem in check(config))
        return problems + [problem.on("tasks") for problem in found]
    problems += task_problems(config)
    for name, view in task_views(config):
        own = f"tasks.{name}."
        for problem in (problem for check in DATA_CHECKS for problem in check(view)):
            key, text, *keys = (
                words.replace("data.", own) for words in (problem.key, problem.text, *problem.keys)
            )
            problems.append(CrossProblem(key, text, ("data", *keys)))
    return problems


def _learning_rates(config: Config) -> Iterator[CrossProblem]:
    client, optimizer = config.client.learning_rate, config.optimizer.learning_rate
    if client != optimizer:
        yield CrossProblem(
            "client.learning_rate",
            f"client.learning_rate is {client!r} and optimizer.learning_rate is {optimizer!r}, "
            "but both mean the local learning rate; give one of them, or the same value twice",
        )


def _something_left_to_train_on(config: Config) -> Iterator[CrossProblem]:
    validation, test = config.data.validation_fraction, config.data.test_fraction
    if validation + test >= 1:
        yield CrossProblem(
            "data.validation_fraction",
            f"data.validation_fraction ({validation!r}) and data.test_fraction ({test!r}) leave "
            "nothing to train on; their sum must be less than 1",
            ("data.test_fraction",),
        )


def _cohort_fits(config: Config) -> Iterator[CrossProblem]:
    drawn, clients = config.federation.clients_per_round, config.federation.num_clients
    if drawn is not None and drawn > clients and not may_be_natural(config):
        yield CrossProblem(
            "federation.clients_per_round",
            f"federation.clients_per_round must be at most federation.num_clients ({clients}), "
            f"got {drawn}",
            CLIENT_KEYS,
        )


def _classes_agree(config: Config) -> Iterator[CrossProblem]:
    names, count = config.data.class_names, config.model.num_classes
    if names is None:
        return
    if count is not None and count != len(names):
        yield CrossProblem(
            "model.num_classes",
            f"model.num_classes is {count}, but data.class_names has {len(names)} names; "
            "leave num_classes out or make them agree",
        )
    twice = sorted(name for name, times in Counter(names).items() if times > 1)
    if twice:
        yield CrossProblem(
            "data.class_names", f"data.class_names names a class twice: {', '.join(twice[:12])}"
        )


def _images_that_stay(config: Config) -> Iterator[CrossProblem]:
    kept, augment = config.engine.prefix_cache, config.data.augment
    if kept in ("memory", "disk") and augment != "none":
        yield CrossProblem(
            "engine.prefix_cache",
            f"engine.prefix_cache: {kept} keeps what frozen layers make of each image, but with "
            f"data.augment: {augment} images differ each time; use engine.prefix_cache: auto or "
            "off, or data.augment: none",
        )


def _gradients_can_be_recovered(config: Config) -> Iterator[CrossProblem]:
    """What SCAFFOLD asks of the optimizer, around whichever strategy."""
    optimizer = config.optimizer
    if not config.federation.scaffold:
        return
    if optimizer.rate_pattern:
        yield CrossProblem(
            "federation.scaffold",
            "federation.scaffold recovers gradients by one learning rate for all tensors; "
            "leave out optimizer.rate_pattern",
        )
    if optimizer.name != "sgd":
        yield CrossProblem(
            "federation.scaffold",
            "federation.scaffold recovers gradients from the way that plain SGD has gone, "
            f"which {optimizer.name}'s steps do not tell; set optimizer.name: sgd",
            ("optimizer.name",),
        )


def _one_source_of_ranks(config: Config) -> Iterator[CrossProblem]:
    dynamic, lora = config.federation.dynamic_ranks, config.model.lora
    given = rank_sources(config)
    if dynamic.enabled:
        given.append("federation.dynamic_ranks.enabled")
    if len(given) > 1:
        yield CrossProblem(
            given[0],
            f"{' and '.join(given)} cannot be used together, as each says what the ranks are; "
            "keep one of them",
        )
    if given and (reason := config.model.no_lora):
        yield CrossProblem(given[0], f"{given[0]} needs an adapter, but {reason}")
    if given and lora.use_dora:
        yield CrossProblem(
            given[0],
            f"{given[0]} changes the rank of the product B A, which is not the whole of a DoRA "
            "update; leave it out, or model.lora.use_dora",
        )
    # How many layers have which rank by a pattern, the model says.
    if dynamic.enabled and not lora.rank_pattern and dynamic.minimum > dynamic.budget * lora.r:
        yield CrossProblem(
            "federation.dynamic_ranks.minimum",
            f"federation.dynamic_ranks.minimum ({dynamic.minimum}) exceeds the mean rank that "
            f"federation.dynamic_ranks.budget allows, {dynamic.budget} of model.lora.r ({lora.r}); "
            "lower the one or raise the other",
            ("federation.dynamic_ranks.budget", "model.lora.r", "model.lora.rank_pattern"),
        )


def _classes_can_change(config: Config) -> Iterator[CrossProblem]:
    other, name = config.evaluation.other_data, config.data.name
    if config.model.head == "linear":
        keys = {"evaluation.other_data": other, "data.train_classes": config.data.train_classes}
        for key in (key for key, given in keys.items() if given):
            yield CrossProblem(
                key,
                f"{key} needs a classifier that takes other classes; use model.head: text, or "
                f"leave {key} out",
            )
    if name in other:
        yield CrossProblem(
            "evaluation.other_data",
            f"evaluation.other_data: {name} is what is trained on; name other data sets",
            ("data.name",),
        )


CHECKS = (
    _one_source_of_ranks,
    _learning_rates,
    named_strategy_problems,
    privacy_problems,
    _gradients_can_be_recovered,
    sharing_problems,
    _classes_can_change,
)
DATA_CHECKS = (  # of `data`, or of each task in its place
    _something_left_to_train_on,
    _cohort_fits,
    caption_problems,
    _classes_agree,
    _images_that_stay,
)
