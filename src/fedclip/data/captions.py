"""Captions in the place of classes: what learning from image-caption pairs makes of a data set.

Each distinct caption is a class: `labels` are the captions' numbers and `class_names` their texts.
So two images are a match for each other's captions where their labels are equal.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import numpy as np

from fedclip.config.names import text_key
from fedclip.data.source import ImageSource, Labels, some
from fedclip.data.splits import ClientData
from fedclip.errors import FedclipWarning, UsageError, shortened

Reader = Callable[[Sequence[str]], Sequence[Hashable]]
"""Texts to what a text tower reads of them."""

WITHOUT_CLASSES = ("iid", "natural", "size")
"""Partitions that ask for no classes."""


def numbered(captions: Sequence[str]) -> tuple[Labels, tuple[str, ...]]:
    """The number of each caption `[n]`, and the distinct captions in the order of their numbers."""
    distinct = {text: number for number, text in enumerate(dict.fromkeys(captions))}
    return np.array([distinct[text] for text in captions], dtype=np.int64), tuple(distinct)


def same_pictures(digests: Sequence[bytes]) -> Labels | None:
    """The number of the picture of each image `[n]`; None where no two are the same.

    Two images are the same picture where their files are, byte for byte: so are the rows of a table
    that give several captions to one path, and copies under other names.
    """
    if len(set(digests)) == len(digests):
        return None
    number = {digest: place for place, digest in enumerate(dict.fromkeys(digests))}
    return np.array([number[digest] for digest in digests], dtype=np.int64)


def with_captions(source: ImageSource, read: Reader | None = None) -> ImageSource:
    """The data set under its captions; one of classes takes them from its first template.

    Captions that the model's text tower reads alike, by `read`, are one caption.
    """
    texts = list(source.class_names)
    if not source.captioned:
        texts = [source.templates[0].replace("{}", name) for name in texts]
    keys = read(texts) if read is not None else [text_key(text) for text in texts]
    place: dict[Hashable, int] = {}
    number = np.array([place.setdefault(key, len(place)) for key in keys], dtype=np.int64)
    first = np.unique(number, return_index=True)[1]
    if len(place) < len(texts):
        alike = next(i for i, n in enumerate(number) if first[n] != i)
        warnings.warn(
            f"data: {len(texts) - len(place)} of {len(texts)} captions are the same as others for "
            "the text tower (in case, blanks or Unicode form, or cut) and count as one with them: "
            f"{shortened(texts[alike])} as {shortened(texts[first[number[alike]]])}",
            FedclipWarning,
            stacklevel=3,
        )
    return replace(
        source,
        labels=number[source.labels],
        class_names=tuple(texts[i] for i in first),
        # What other classes will be put in.
        templates=source.templates if source.captioned else source.templates[:1],
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


def with_two_pairs(
    clients: Sequence[ClientData], pictures: Labels | None = None
) -> tuple[ClientData, ...]:
    """The clients that can learn: a single pair has nothing to be told apart from.

    Nor has a single picture (`same_pictures`), however many captions it has.
    """

    def can_learn(client: ClientData) -> bool:
        kinds = client.train if pictures is None else np.unique(pictures[client.train])
        return len(kinds) > 1

    able = tuple(client for client in clients if can_learn(client))
    idle = [client.client_id for client in clients if not can_learn(client)]
    if not able:
        raise UsageError(
            "data: no client has two image-caption pairs to train on; use more data, or lower "
            "federation.num_clients"
        )
    if idle:
        warnings.warn(
            f"clients with a single training pair or picture are left out: {some(idle)}",
            FedclipWarning,
            stacklevel=3,
        )
    return able
