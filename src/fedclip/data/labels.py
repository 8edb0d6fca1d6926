"""Labels as data sets write them; one that means "hidden" or "none" never becomes a class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedclip.data.source import ImageSource, Labels
from fedclip.errors import FedclipWarning, UsageError

UNKNOWN = -1


def is_hidden(value: Any) -> bool:
    """Whether a label means that there is none: null, NaN, -1 (as the hub's test sets), blank."""
    if isinstance(value, str):
        return value.strip() in ("", "-1")
    return value is None or value == UNKNOWN or value != value


def class_numbers(values: Sequence[Any]) -> Labels:
    """Class numbers `[n]` of a data set that numbers its classes itself, -1 where hidden."""
    return np.array([UNKNOWN if is_hidden(value) else value for value in values], dtype=np.int64)


def numbered_labels(values: Sequence[Any]) -> tuple[Labels, list[str]]:
    """Class numbers `[n]` (-1 where hidden), and the classes' names: the sorted distinct values."""
    distinct = sorted({value for value in values if not is_hidden(value)})
    number = {value: i for i, value in enumerate(distinct)}
    labels = [UNKNOWN if is_hidden(value) else number[value] for value in values]
    return np.array(labels, dtype=np.int64), [str(value) for value in distinct]


def labelled(source: ImageSource) -> ImageSource:
    """The data set without the images whose label is -1; says how many these are, by split.

    Refuses one that is left with none, and labels that are no number of a class.
    """
    what, classes = "caption" if source.captioned else "label", len(source.class_names)
    labels = np.asarray(source.labels)
    if labels.dtype.kind not in "iu":
        raise UsageError(
            f"data: the labels of {source.name} must be whole numbers, not {labels.dtype}"
        )
    wrong = labels[(labels < UNKNOWN) | (labels >= classes)]
    if len(wrong):
        raise UsageError(
            f"data: {len(wrong)} labels of {source.name} are no number of a class, as {wrong[0]}; "
            f"there are {classes} classes, numbered from 0, and -1 means that there is no label"
        )
    known = labels != UNKNOWN
    if known.all():
        return source
    if not known.any():
        raise UsageError(f"data: all {len(labels)} images of {source.name} are without a {what}")
    split = _splits(source)
    counts = [
        f"{name}: {int((split[~known] == name).sum())} of {int((split == name).sum())}"
        for name in ("train", "validation", "test")
        if (split[~known] == name).any()
    ]
    warnings.warn(
        f"{source.name}: {int((~known).sum())} images without a {what} are left out "
        f"({', '.join(counts)})",
        FedclipWarning,
        stacklevel=3,
    )
    return source.only(np.flatnonzero(known))


def _splits(source: ImageSource) -> np.ndarray:
    split = np.full(len(source), "train", dtype="<U10")
    if source.is_validation is not None:
        split[source.is_validation] = "validation"
    if source.is_test is not None:
        split[source.is_test] = "test"
    return split
