"""A data set in memory: a table of `datasets`, or arrays and lists."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from fedclip.catalog import GIVEN
from fedclip.data.captions import numbered
from fedclip.data.class_names import one_class_by_name
from fedclip.data.labels import UNKNOWN, is_hidden, numbered_labels
from fedclip.data.pictures import ListedImages, checked_array, checked_list
from fedclip.data.prompts import PROMPTS
from fedclip.data.source import ArrayImages, ImageSource, ImageStore, Labels, mask_or_none, some
from fedclip.data.sources.columns import CAPTION_NAMES, LABEL_NAMES, Table
from fedclip.data.sources.table import SPLITS, by_split, source_of
from fedclip.errors import FedclipWarning, UsageError, shortened

KEYS = ("images", "labels", "class_names", "captions", "sites", "split")
_WANTED = (
    "a datasets.Dataset or DatasetDict with columns such as image and label, or a dictionary with "
    f"images and labels (keys: {', '.join(KEYS)})"
)
_SPLIT = {alias: split for split, aliases in SPLITS.items() for alias in aliases}


def in_memory(data: Any) -> ImageSource:
    """The data set that the argument `data` holds.

    A table has an image column, and one of labels or captions; a column `site` has natural sites.
    A dictionary has `images`, and `labels` or `captions`, and may have `class_names`, `sites` and
    `split` (train, validation or test). UsageError, which begins with `data`, for anything else.
    """
    tables = _tables(data)
    if tables:
        return _of_tables(tables)
    if isinstance(data, Mapping) and {*data} & {*KEYS}:
        return _of_arrays(data)
    raise UsageError(f"data must be {_WANTED}, got a {type(data).__name__}")


def _tables(data: Any) -> dict[str, Any]:
    """The tables of `datasets` in an object, by split; none where it holds anything else."""
    if isinstance(data, Mapping):
        parts = dict(data)
        if not parts or not all(hasattr(part, "features") for part in parts.values()):
            return {}
    elif hasattr(data, "features"):
        parts = {"train": data}
    else:
        return {}
    import datasets

    for part in parts.values():
        if not isinstance(part, datasets.Dataset):
            raise UsageError(
                f"data must be {_WANTED}, got {type(part).__name__}; of one that is streamed make "
                "a table: datasets.Dataset.from_list(list(data), features=data.features)"
            )
        if part.format["type"] == "custom":
            raise UsageError(
                "data has a transform (set_transform, with_transform), which is not applied here: "
                "apply it with data.map, or take it off with data.reset_format()"
            )
    return {split: part.with_format(None) for split, part in parts.items()}


def _of_tables(tables: dict[str, Any]) -> ImageSource:
    named = Table(
        "the table",
        "data",
        "call the one that counts {!r} (data.rename_column), or leave the others out "
        "(data.select_columns); images are cast by data.cast_column(name, datasets.Image())",
    )
    left_out = [split for split in tables if split not in _SPLIT]
    parts = by_split(named, tables)
    if left_out:
        warnings.warn(
            f"data: splits other than train, validation and test are left out: {some(left_out)}",
            FedclipWarning,
            stacklevel=2,
        )
    features = parts["train"].features
    for names in (("image", "img"), LABEL_NAMES, CAPTION_NAMES):
        found = [name for name in names if name in features]
        if names[0] not in found and len(found) > 1:
            raise UsageError(
                f"data: the table has several columns for {names[0]!r}: {', '.join(found)}; "
                f"{named.choose.format(names[0])}"
            )
    options = {"site": "site"} if "site" in features else {}
    here = Path.cwd()  # files that a table in memory names are its owner's, wherever they are
    return source_of(GIVEN, named, parts, options, (here, Path(here.anchor)))


def _of_arrays(data: Mapping[Any, Any]) -> ImageSource:
    unknown = [key for key in data if key not in KEYS]
    if unknown:
        raise UsageError(f"data: unknown key {shortened(unknown[0])}; known: {', '.join(KEYS)}")
    captioned = data.get("captions") is not None
    if data.get("images") is None or captioned == (data.get("labels") is not None):
        raise UsageError("data needs images, and either labels or captions")
    images, count = _images(data["images"])
    if not count:
        raise UsageError("data['images'] is empty")
    if captioned and data.get("class_names") is not None:
        raise UsageError("data['class_names'] names classes, but captions have none; leave it out")
    labels, class_names = (
        numbered(_captions(data["captions"], count)) if captioned else _labels(data, count)
    )
    split = _split(data.get("split"), count)
    own = data.get("sites")
    sites, site_names = numbered_labels([] if own is None else _column(own, "sites", count))
    return ImageSource(
        name=GIVEN,
        images=images,
        labels=labels,
        class_names=tuple(class_names),
        templates=PROMPTS["pairs" if captioned else "hub"].templates,
        is_test=mask_or_none(split == "test"),
        is_validation=mask_or_none(split == "validation"),
        sites=None if own is None else sites,
        site_names=tuple(site_names),
        captioned=captioned,
    )


def _images(images: Any) -> tuple[ImageStore, int]:
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        pictures = checked_list(images, "data['images']")
        return ListedImages(pictures, GIVEN), len(pictures)
    array = checked_array(images, "data['images']")
    return ArrayImages(array, GIVEN), len(array)


def _column(values: Any, key: str, count: int) -> list[Any]:
    """One value for each image: whole numbers, or texts, with None for no value."""
    listed = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(listed, str | bytes) or not isinstance(listed, Sequence):
        raise UsageError(f"data[{key!r}] must be a list or an array, got {shortened(values)}")
    if len(listed) != count:
        raise UsageError(
            f"data[{key!r}] must hold one value for each of the {count} images, got {len(listed)}"
        )
    for kind in (Integral, str):
        if all(isinstance(v, kind | None) and not isinstance(v, bool | np.bool_) for v in listed):
            return [int(v) if isinstance(v, Integral) else v for v in listed]
    odd = next((v for v in listed if not isinstance(v, Integral | str | None)), listed[0])
    raise UsageError(
        f"data[{key!r}] must hold whole numbers, or texts, and not both, got {shortened(odd)}, a "
        f"{type(odd).__name__}"
    )


def _captions(values: Any, count: int) -> list[str]:
    captions = _column(values, "captions", count)
    blank = [i for i, text in enumerate(captions) if not isinstance(text, str) or not text.strip()]
    if blank:
        raise UsageError(
            f"data['captions'][{blank[0]}] must be a text, got {shortened(captions[blank[0]])}"
        )
    return [text.strip() for text in captions]


def _split(values: Any, count: int) -> np.ndarray:
    """Each image's split; all are for training where none is named."""
    listed = ["train"] * count if values is None else _column(values, "split", count)
    wrong = [value for value in listed if value not in _SPLIT]
    if wrong:
        raise UsageError(
            f"data['split'] must be train, validation or test for each image, got "
            f"{shortened(wrong[0])}"
        )
    return np.array([_SPLIT[value] for value in listed])


def _labels(data: Mapping[Any, Any], count: int) -> tuple[Labels, Sequence[str]]:
    """Class numbers, -1 where there is no label, and the classes' names."""
    values, names = _column(data["labels"], "labels", count), data.get("class_names")
    numbers = any(isinstance(value, int) and value != UNKNOWN for value in values)
    if names is None and numbers:
        raise UsageError(
            "data['labels'] are numbers, so data['class_names'] must name the classes, in their "
            "order: CLIP's classifier reads the names"
        )
    if names is None:
        labels, found = numbered_labels(values)
        classes, cleaned = one_class_by_name(found, "data['labels']")
        return np.append(np.array(classes, dtype=np.int64), UNKNOWN)[labels], cleaned
    names = _class_names(names)
    known = {value: i for i, value in enumerate(range(len(names)) if numbers else names)}
    wrong = [value for value in values if not is_hidden(value) and value not in known]
    if wrong:
        there = f"numbers from 0 to {len(names) - 1}" if numbers else some(names)
        raise UsageError(
            f"data['labels'] holds {shortened(wrong[0])}, which is none of the {len(names)} "
            f"classes of data['class_names'] ({there})"
        )
    places = [UNKNOWN if is_hidden(value) else known[value] for value in values]
    return np.array(places, dtype=np.int64), names


def _class_names(names: Any) -> list[str]:
    listed = names.tolist() if isinstance(names, np.ndarray) else names
    sound = isinstance(listed, Sequence) and not isinstance(listed, str | bytes) and len(listed)
    if not sound or not all(isinstance(name, str) and name.strip() for name in listed):
        raise UsageError(
            f"data['class_names'] must be a list of texts, one a class, got {shortened(names)}"
        )
    return [name.strip() for name in listed]
