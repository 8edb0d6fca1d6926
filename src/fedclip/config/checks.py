"""Checks that concern more than one key of a configuration.

They read plain mappings, where any value may still be missing or of a wrong type (which is
reported elsewhere), so that they can speak in the same breath as the checks of single keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from fedclip.config.checks_data import caption_problems, may_be_natural
from fedclip.config.checks_privacy import privacy_problems
from fedclip.config.checks_strategy import named_strategy_problems, rank_sources
from fedclip.config.checks_tasks import sharing_problems, task_problems, task_views
from fedclip.config.model import no_lora
from fedclip.config.section import CrossProblem, lookup, number

__all__ = ["CrossProblem", "cross_problems", "lookup"]


def cross_problems(values: Mapping[str, Any]) -> list[CrossProblem]:
    """Say what does not fit together in a configuration given as nested mappings."""
    problems = [problem for check in CHECKS for problem in check(values)]
    if not lookup(values, "tasks"):
        return problems + [problem for check in DATA_CHECKS for problem in check(values)]
    problems += task_problems(values)
    for name, view in task_views(values):
        own = f"tasks.{name}."
        for problem in (problem for check in DATA_CHECKS for problem in check(view)):
            key, text = (words.replace("data.", own) for words in (problem.key, problem.text))
            problems.append(CrossProblem(key, text))
    return problems


def _learning_rates(values: Mapping[str, Any]) -> Iterator[CrossProblem]:
    client = number(values, "client.learning_rate")
    optimizer = number(values, "optimizer.learning_rate")
    if client is not None and optimizer is not None and client != optimizer:
        yield CrossProblem(
            "client.learning_rate",
            f"client.learning_rate is {client!r} and optimizer.learning_rate is {optimizer!r}, "
            "but both mean the local learning rate; give one of them, or the same value twice",
        )


def _something_left_to_train_on(values: Mapping[str, Any]) -> Iterator[CrossProblem]:
    validation = number(values, "data.validation_fraction")
    test = number(values, "data.test_fraction")
    if validation is not None and test is not None and validation < 1 and test < 1:
        if validation + test < 1:
            return
        yield CrossProblem(
            "data.validation_fraction",
            f"data.validation_fraction ({validation!r}) and data.test_fraction ({test!r}) leave "
            "nothing to train on; their sum must be less than 1",
        )


def _cohort_fits(values: Mapping[str, Any]) -> Iterator[CrossProblem]:
    drawn = number(values, "federation.clients_per_round")
    clients = number(values, "federation.num_clients")
    if drawn is None or clients is None or may_be_natural(values):
        return
    if drawn > clients:
        yield CrossProblem(
            "federation.clients_per_round",
            f"federation.clients_per_round must be at most federation.num_clients ({clients}), "
            f"got {drawn}",
        )


def _captions(values: Mapping[str, Any]) -> Iterator[CrossProblem]:
    for key, text in caption_problems(lambda key: lookup(values, key)):
        yield CrossProblem(key, text)


def _classes_agree(values: Mapping[str, Any]) -> Iterator[CrossProblem]:
    names = lookup(values, "data.class_names")
    if not isinstance(names, list | tuple) or not names:
        return
    count = number(values, "model.num_classes")
    if count is not None and count != len(names):
        yield CrossProblem(
            "model.num_classes",
            f"model.num_classes is {count}, but data.class_names has {len(names)} names; "
            "leave num_classes out or make them agree",
        )
    twice = sorted(name for name, times in Counter(map(str, names)).items() if times > 1)
    if twice:
        yield CrossProblem(
            "data.class_names", f"data.class_names names a class twice: {', '.join(twice[:12])}"
        )


def _images_that_stay(values: Mapping[str, Any]) -> Iterator[CrossProblem]:
    kept = lookup(values, "engine.prefix_cache")
    augment = lookup(values, "data.augment")
    if kept in ("memory", "disk") and isinstance(augment, str) and augment != "none":
        yield CrossProblem(
            "engine.prefix_cache",
            f"engine.prefix_cache: {kept} keeps what frozen layers make of each image, but with "
            f"data.augment: {augment} images differ each time; use engine.prefix_cache: auto or "
            "off, or data.augment: none",
        )


def _gradients_can_be_recovered(values: Mapping[str, Any]) -> Iterator[CrossProblem]:
    """What SCAFFOLD asks of the optimizer, around whichever strategy."""
    if lookup(values, "federation.scaffold") is not True:
        return
    if lookup(values, "optimizer.rate_pattern"):
        yield CrossProblem(
            "federation.scaffold",
            "federation.scaffold recovers gradients by one learning rate for all tensors; "
            "leave out optimizer.rate_pattern",
        )
    optimizer = lookup(values, "optimizer.name")
    if isinstance(optimizer, str) and optimizer != "sgd":
        yield CrossProblem(
            "federation.scaffold",
            "federation.scaffold recovers gradients from the way that plain SGD has gone, "
            f"which {optimizer}'s steps do not tell; set optimizer.name: sgd",
        )


def _one_source_of_ranks(values: Mapping[str, Any]) -> Iterator[CrossProblem]:
    dynamic = lookup(values, "federation.dynamic_ranks.enabled") is True
    given = rank_sources(values)
    if dynamic:
        given.append("federation.dynamic_ranks.enabled")
    if len(given) > 1:
        yield CrossProblem(
            given[0],
            f"{' and '.join(given)} cannot be used together, as each says what the ranks are; "
            "keep one of them",
        )
    if given and (reason := no_lora(values)):
        yield CrossProblem(given[0], f"{given[0]} needs an adapter, but {reason}")
    if given and lookup(values, "model.lora.use_dora") is True:
        yield CrossProblem(
            given[0],
            f"{given[0]} changes the rank of the product B A, which is not the whole of a DoRA "
            "update; leave it out, or model.lora.use_dora",
        )
    r, minimum = number(values, "model.lora.r"), number(values, "federation.dynamic_ranks.minimum")
    budget = number(values, "federation.dynamic_ranks.budget")
    if not dynamic or r is None or minimum is None or budget is None or minimum <= budget * r:
        return
    if lookup(values, "model.lora.rank_pattern"):
        return  # how many layers have which rank, the model says
    yield CrossProblem(
        "federation.dynamic_ranks.minimum",
        f"federation.dynamic_ranks.minimum ({minimum}) exceeds the mean rank that "
        f"federation.dynamic_ranks.budget allows, {budget} of model.lora.r ({r}); lower the one or "
        "raise the other",
    )


def _classes_can_change(values: Mapping[str, Any]) -> Iterator[CrossProblem]:
    other = lookup(values, "evaluation.other_data")
    if lookup(values, "model.head") == "linear":
        keys = ("evaluation.other_data", "data.train_classes")
        for key in (key for key in keys if lookup(values, key)):
            yield CrossProblem(
                key,
                f"{key} needs a classifier that takes other classes; use model.head: text, or "
                f"leave {key} out",
            )
    name = lookup(values, "data.name")
    if isinstance(other, list | tuple) and name in other:
        yield CrossProblem(
            "evaluation.other_data",
            f"evaluation.other_data: {name} is what is trained on; name other data sets",
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
    _captions,
    _classes_agree,
    _images_that_stay,
)
