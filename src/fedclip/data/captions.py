"""Captions in the place of classes: what learning from image-caption pairs makes of a data set.

Each distinct caption is a class: `labels` are the captions' numbers and `class_names` their texts.
So two images are a match for each other's captions where their labels are equal.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedclip.data.source import ImageSource, Labels, some
from fedclip.data.splits import ClientData
from fedclip.errors import FedclipWarning, UsageError

WITHOUT_CLASSES = ("iid", "natural", "size")
"""Partitions that ask for no classes."""


def numbered(captions: Sequence[str]) -> tuple[Labels, tuple[str, ...]]:
    """The number of each caption `[n]`, and the distinct captions in the order of their numbers."""
    distinct = {text: number for number, text in enumerate(dict.fromkeys(captions))}
    return np.array([distinct[text] for text in captions], dtype=np.int64), tuple(distinct)


def with_captions(source: ImageSource) -> ImageSource:
    """The data set under its captions; one of classes takes them from its first template."""
    if source.captioned:
        return source
    texts = [source.templates[0].replace("{}", name) for name in source.class_names]
    number, captions = numbered(texts)
    return replace(
        source,
        labels=number[source.labels],
        class_names=captions,
        templates=source.templates[:1],  # what other classes will be put in
    )


def require_no_classes(source: ImageSource, name: str, shots: int | None) -> None:
    """Refuse a partition `name`, or shots, by classes of pairs that know none."""
    if source.captioned and shots is not None:
        raise UsageError(
            "data.shots counts images by class, which captions do not have; leave it out, or use "
            "data.max_train_examples"
        )
    if source.captioned and name not in WITHOUT_CLASSES:
        raise UsageError(
            f"data.partition.name: {name} divides by classes, which captions do not have; choose "
            f"one of {', '.join(WITHOUT_CLASSES)}"
        )


def require_classes(source: ImageSource) -> None:
    """Refuse to classify into captions."""
    if source.captioned:
        raise UsageError(
            f"data.name: {source.name} holds captions, not classes; set task: contrastive to "
            "learn from them, or name a column of classes"
        )


def with_two_pairs(clients: Sequence[ClientData]) -> tuple[ClientData, ...]:
    """The clients that can learn: a single pair has nothing to be told apart from."""
    able = tuple(client for client in clients if len(client.train) > 1)
    idle = [client.client_id for client in clients if len(client.train) < 2]
    if not able:
        raise UsageError(
            "data: no client has two image-caption pairs to train on; use more data, or lower "
            "federation.num_clients"
        )
    if idle:
        warnings.warn(
            f"clients with a single training pair are left out: {some(idle)}",
            FedclipWarning,
            stacklevel=3,
        )
    return able
