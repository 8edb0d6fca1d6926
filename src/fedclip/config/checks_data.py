"""Checks of what is learned, classes or captions, and from which data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedclip.catalog import DATA_SETS
from fedclip.config.section import CrossProblem

if TYPE_CHECKING:
    from fedclip.config.tree import Config

CLIENT_KEYS = (
    *("federation.num_clients", "federation.clients_per_round", "deploy.sites"),
    *("data.partition.name", "data.name"),
)
"""The keys on which the number of a round's clients depends."""


def caption_problems(config: Config) -> Iterator[CrossProblem]:
    """What does not fit the data set, or the task."""
    data, row = config.data, DATA_SETS.get(config.data.name)
    captioned = row is not None and row.captioned
    if row is not None and row.path and data.path is None:
        yield CrossProblem(
            "data.path", f"data.path must name {row.path} with data.name: {data.name}"
        )
    if config.task == "classification" and captioned:
        yield CrossProblem(
            "task",
            f"task: classification needs classes, but data.name: {data.name} has captions; set "
            "task: contrastive",
        )
    if captioned and data.shots is not None:
        yield CrossProblem(
            "data.shots",
            f"data.shots counts images by class, which data.name: {data.name} does not have; leave "
            "it out, or use data.max_train_examples",
        )
    if captioned and data.class_names:
        yield CrossProblem(
            "data.class_names",
            f"data.class_names: data.name: {data.name} has no classes; leave it out",
        )
    if config.task == "contrastive":
        yield from _contrastive(config)


def _contrastive(config: Config) -> Iterator[CrossProblem]:
    if config.model.head == "linear":
        yield CrossProblem(
            "model.head",
            "model.head: linear is a classifier, but task: contrastive compares images with "
            "captions; leave model.head out",
        )
    if config.model.num_classes is not None:
        yield CrossProblem(
            "model.num_classes",
            "model.num_classes: task: contrastive has no classes; leave it out",
        )
    if config.data.batch_size == 1:
        yield CrossProblem(
            "data.batch_size",
            "data.batch_size: 1 leaves a pair nothing to be told apart from; task: contrastive "
            "needs at least 2, and learns better from 32 or more",
        )
    of_classes = {
        "evaluation.other_data": config.evaluation.other_data,
        "evaluation.metrics": config.evaluation.metrics,
        "data.train_classes": config.data.train_classes,
    }
    for key in (key for key, given in of_classes.items() if given):
        yield CrossProblem(
            key, f"{key} measures classes, which task: contrastive does not have; leave it out"
        )


def may_be_natural(config: Config) -> bool:
    """Whether the data set's sites may be the clients, whose number then is not `num_clients`."""
    partition, row = config.data.partition.name, DATA_SETS.get(config.data.name)
    return partition == "natural" or (partition == "auto" and (row is None or row.sites))


def clients_of_a_round(config: Config) -> tuple[str, float]:
    """The key that says how many clients a round has, and how many, or which share."""
    federation, sites = config.federation, config.deploy.sites
    if federation.clients_per_round is not None:
        return "federation.clients_per_round", federation.clients_per_round
    if sites is not None:
        return "deploy.sites", len(sites)
    return "federation.num_clients", federation.num_clients


def rank_sources(config: Config) -> list[str]:
    """The keys given that make clients' ranks differ."""
    keys = ("client_ranks", "client_memory_mb")
    return [f"federation.{key}" for key in keys if getattr(config.federation, key) is not None]
