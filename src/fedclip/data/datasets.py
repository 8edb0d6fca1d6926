"""A data set by name: its images, labels, class names, templates, splits and sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedclip.catalog import DATA_SETS
from fedclip.config.lookup import load
from fedclip.config.names import check_classes_differ, class_key, site_names
from fedclip.data.labels import labelled
from fedclip.data.prompts import check_templates
from fedclip.data.source import ImageSource, some
from fedclip.errors import FedclipError, UsageError


def load_source(
    name: str,
    *,
    path: str | None = None,
    layout: str = "auto",
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
) -> ImageSource:
    """The data set `name`, not decoded yet, under the given class names and templates."""
    source = _read(name, path, layout)
    if not len(source):
        raise UsageError(f"data: {name} holds no images{f' (data.path: {path})' if path else ''}")
    source = replace(source, site_names=site_names(source.site_names, f"data: {name}"))
    source = labelled(source)
    if class_names is not None and source.captioned:
        raise UsageError(f"data.class_names names classes, but {name} holds captions; leave it out")
    if class_names is not None:
        source = _rename(source, [str(class_name) for class_name in class_names])
    if not source.captioned:
        check_classes_differ(source.class_names, f"data: classes of {name}")
    if templates is not None:
        source = replace(source, templates=check_templates(templates))
    return source


def _read(name: str, path: str | None, layout: str) -> ImageSource:
    """What the data set's reader returns; of a reader from elsewhere, checked."""
    reader = load("data_sets", name)
    if name in DATA_SETS:
        return reader(path, layout)
    try:
        source = reader(path, layout)
    except FedclipError:
        raise
    except Exception as error:
        raise UsageError(
            f"data.name: {name} cannot be read: {type(error).__name__}: {error}; it is called with "
            "data.path (or None) and data.layout"
        ) from error
    if not isinstance(source, ImageSource):
        raise UsageError(
            f"data.name: {name} must return a fedclip.data.source.ImageSource, got "
            f"{type(source).__name__}"
        )
    return source


def _rename(source: ImageSource, names: list[str]) -> ImageSource:
    """Give the classes other names; names that the data set has itself only set the order."""
    own = list(source.class_names)
    if len(names) != len(own):
        raise UsageError(
            f"data.class_names must name the {len(own)} classes of {source.name} "
            f"({some(own)}), got {len(names)} ({some(names)})"
        )
    check_classes_differ(names, "data.class_names")
    given, known = [class_key(name) for name in names], [class_key(name) for name in own]
    if sorted(given) == sorted(known):
        new_index = np.array([given.index(name) for name in known], dtype=np.int64)
        return replace(source, labels=new_index[source.labels], class_names=tuple(names))
    moved = [name for i, name in enumerate(given) if name in known and known[i] != name]
    if moved:
        raise UsageError(
            f"data.class_names does not match the classes of {source.name}: {some(moved)} stands "
            f"in another place there ({some(own)}); keep that order"
        )
    return replace(source, class_names=tuple(names))
