"""Checks of what is learned, classes or captions, and from which data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fedclip.catalog import DATA_SETS
from fedclip.config.section import lookup


def caption_problems(get: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    """Keys that do not fit data or task, each with what to say; `get` reads the value of a key."""
    task, name = get("task"), get("data.name")
    row = DATA_SETS.get(name) if isinstance(name, str) else None
    captioned = row is not None and row.captioned
    if row is not None and row.path and get("data.path") is None:
        yield "data.path", f"data.path must name {row.path} with data.name: {name}"
    if task == "classification" and captioned:
        yield (
            "task",
            f"task: classification needs classes, but data.name: {name} has captions; set task: "
            "contrastive",
        )
    if captioned and get("data.shots") is not None:
        yield (
            "data.shots",
            f"data.shots counts images by class, which data.name: {name} does not have; leave it "
            "out, or use data.max_train_examples",
        )
    if captioned and get("data.class_names"):
        yield (
            "data.class_names",
            f"data.class_names: data.name: {name} has no classes; leave it out",
        )
    if task != "contrastive":
        return
    if get("model.head") == "linear":
        yield (
            "model.head",
            "model.head: linear is a classifier, but task: contrastive compares images with "
            "captions; leave model.head out",
        )
    if get("model.num_classes") is not None:
        yield (
            "model.num_classes",
            "model.num_classes: task: contrastive has no classes; leave it out",
        )
    if get("data.batch_size") == 1:
        yield (
            "data.batch_size",
            "data.batch_size: 1 leaves a pair nothing to be told apart from; task: contrastive "
            "needs at least 2, and learns better from 32 or more",
        )
    for key in ("evaluation.other_data", "evaluation.metrics", "data.train_classes"):
        if get(key):
            yield (
                key,
                f"{key} measures classes, which task: contrastive does not have; leave it out",
            )


def may_be_natural(values: Mapping[str, Any]) -> bool:
    """Whether the data set's sites may be the clients, whose number then is not `num_clients`."""
    partition, name = lookup(values, "data.partition.name"), lookup(values, "data.name")
    row = DATA_SETS.get(name) if isinstance(name, str) else None
    return partition == "natural" or (partition == "auto" and (row is None or row.sites))
