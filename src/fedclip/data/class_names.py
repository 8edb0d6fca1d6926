"""Classes by name: which names of a data set stand for one class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from fedclip.config.names import class_key, clean_class_name
from fedclip.data.source import some
from fedclip.errors import FedclipWarning, shortened


def one_class_by_name(names: Sequence[str], what: str) -> tuple[list[int], tuple[str, ...]]:
    """The class of each name, by number, and the classes' names, cleaned.

    For folders and columns of texts, where the name is all that says which class it is. Names that
    a text tower reads alike are one class, under the first of them, with a warning.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(class_key(clean_class_name(name)), []).append(name)
    shared = [group for group in groups.values() if len(group) > 1]
    if shared:
        listed = some(" = ".join(map(shortened, group)) for group in shared)
        warnings.warn(
            f"{what} whose names differ in case, blanks or Unicode form only are one class, as a "
            f"text tower reads them alike: {listed}; rename them if they are different",
            FedclipWarning,
            stacklevel=3,
        )
    number = {key: i for i, key in enumerate(groups)}
    numbers = [number[class_key(clean_class_name(name))] for name in names]
    return numbers, tuple(clean_class_name(group[0]) for group in groups.values())
