"""A table that `datasets` has opened, by split: its images, and its classes or captions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fedclip.config.names import clean_class_name
from fedclip.data.captions import numbered
from fedclip.data.class_names import one_class_by_name
from fedclip.data.labels import class_numbers, numbered_labels
from fedclip.data.prompts import PROMPTS
from fedclip.data.source import ImageSource, mask_or_none
from fedclip.data.sources.columns import Table, caption_column, image_column, label_column, listed
from fedclip.data.sources.hub_images import HubImages
from fedclip.errors import FedclipWarning, UsageError

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}


def source_of(
    source_name: str,
    named: Table,
    parts: dict[str, Any],
    options: dict[str, str],
    roots: tuple[Path, ...],
) -> ImageSource:
    """A data set of the tables of `by_split`; `options` name columns, files are below `roots`."""
    import datasets

    features = parts["train"].features
    image = image_column(named, features, options.get("image"))
    caption = caption_column(named, features, options)
    label = caption or label_column(named, features, options.get("label"))
    parts = _same_columns(named.name, parts, [image, label, options.get("site")])
    table = datasets.concatenate_datasets(list(parts.values()))
    split = np.repeat(list(parts), [len(part) for part in parts.values()])
    if caption:
        rows, texts = _each_caption(named, table, caption)
        table, split = table.select(rows), split[rows]
    labels, class_names = _captions(texts) if caption else _classes(named, table, label)
    sites, site_names = _sites(named, table, options.get("site"))
    encoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return ImageSource(
        name=source_name,
        images=HubImages(encoded, image, named.name, roots),
        labels=labels,
        class_names=tuple(class_names),
        templates=PROMPTS["pairs" if caption else "hub"].templates,
        is_test=mask_or_none(split == "test"),
        is_validation=mask_or_none(split == "validation"),
        sites=sites,
        site_names=site_names,
        captioned=caption is not None,
    )


def by_split(named: Table, data: Any) -> dict[str, Any]:
    """Tables under `train`, `validation`, `test`; a bare table is all training."""
    import datasets

    if isinstance(data, datasets.Dataset):
        return {"train": data}
    parts = {
        split: data[alias]
        for split, aliases in SPLITS.items()
        for alias in aliases
        if alias in data
    }
    if "train" not in parts:
        raise UsageError(
            f"{named.told} has no train split; it has {', '.join(map(str, data)) or 'none'}"
        )
    return parts


def _same_columns(name: str, parts: dict[str, Any], columns: list[str | None]) -> dict[str, Any]:
    """The needed columns only; splits that lack one, or hold another type there, are left out."""
    needed = list(dict.fromkeys(column for column in columns if column is not None))
    train = parts["train"].features
    kept = {}
    for split, part in parts.items():
        if any(part.features.get(column) != train.get(column) for column in needed):
            warnings.warn(
                f"{name}: its {split} split is left out, since its columns "
                f"({listed(part.features)}) are not those of the train split ({listed(train)})",
                FedclipWarning,
                stacklevel=3,
            )
        else:
            kept[split] = part.select_columns([column for column in needed if column in train])
    return kept


def _each_caption(named: Table, table: Any, column: str) -> tuple[np.ndarray, list[str]]:
    """The row of each caption, and the captions ("" where there is none); lists have several."""
    rows, texts = [], []
    cells = table.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    for row, found in enumerate(cells):
        for text in (found or [None]) if isinstance(found, list) else [found]:
            if text is not None and not isinstance(text, str):
                raise UsageError(f"{named.key}: column {column!r} holds no captions, but {text!r}")
            rows.append(row)
            texts.append((text or "").strip())
    return np.array(rows, dtype=np.int64), texts


def _captions(texts: list[str]) -> tuple[np.ndarray, list[str]]:
    """Numbers of the captions (-1 where there is none) and the distinct ones."""
    numbers, _ = numbered([text for text in texts if text])
    found = np.full(len(texts), -1, dtype=np.int64)
    found[[bool(text) for text in texts]] = numbers
    return found, list(dict.fromkeys(text for text in texts if text))


def _classes(named: Table, table: Any, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class indices (-1 where unknown) and names; numbered classes keep their numbers."""
    import datasets

    indices, names = _labels(named, table, column)
    if isinstance(table.features[column], datasets.ClassLabel):
        return indices, tuple(map(clean_class_name, names))
    numbers, cleaned = one_class_by_name(names, f"values of the column {column!r}")
    return np.append(np.array(numbers, dtype=np.int64), -1)[indices], cleaned


def _labels(named: Table, table: Any, column: str) -> tuple[np.ndarray, list[str]]:
    """Class indices (-1 where unknown) and names: a ClassLabel's, else the sorted values."""
    import datasets

    kind = table.features[column]
    values = table.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    if isinstance(kind, datasets.ClassLabel):
        return class_numbers(values), list(kind.names)
    if not str(getattr(kind, "dtype", "")).startswith(("string", "large_string", "int", "uint")):
        raise UsageError(f"{named.key}: column {column!r} holds no class labels, but {kind}")
    return numbered_labels(values)


def _sites(
    named: Table, table: Any, column: str | None
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Site of each row (-1 where unknown) and the sites' names, sorted."""
    if column is None:
        return None, ()
    if column not in table.features:
        raise UsageError(f"{named.told} has no column {column!r}: {listed(table.features)}")
    indices, names = _labels(named, table, column)
    plain = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    # An empty cell names no site, nor does a missing one, whose index is -1.
    places = [plain.index(name.strip()) if name.strip() else -1 for name in names]
    indices, names = np.array([*places, -1], dtype=np.int64)[indices], plain
    short = [Path(name).stem for name in names]
    if column == "__url__" and len(set(short)) == len(names):  # webdataset's: a site is a shard
        names = short
    return indices, tuple(names)
