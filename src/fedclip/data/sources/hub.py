"""Any image-classification set that `datasets` opens: a hub id, or a local path."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from fedclip.config.names import clean_class_name
from fedclip.data.captions import numbered
from fedclip.data.class_names import one_class_by_name
from fedclip.data.labels import class_numbers, numbered_labels
from fedclip.data.prompts import PROMPTS
from fedclip.data.source import ImageSource, mask_or_none
from fedclip.data.sources.columns import caption_column, image_column, label_column, listed
from fedclip.data.sources.hub_files import check_named_files, check_saved_files
from fedclip.data.sources.hub_images import HubImages, roots_of
from fedclip.errors import FedclipWarning, UsageError

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
OPTIONS = ("config", "revision", "image", "label", "caption", "site")


def hub(path: str | None = None, layout: str = "auto") -> ImageSource:
    """A data set of the hub, by id, or from disk: a `save_to_disk`, parquet or image folder.

    The image column and the label column are found by type and name. Where that is not enough,
    options follow the id: `user/name?config=small&label=kind&site=hospital`; `site` names a
    column whose values are natural sites. `caption` names a column of captions, which then take
    the place of classes; a cell with a list of captions makes a pair of each. `path` may be `.tar`
    shards of webdataset, whose captions are NAME.txt.
    """
    if not path:
        raise UsageError("data.path: hub needs a data set's id (user/name) or a local path")
    name, _, query = path.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = set(options) - set(OPTIONS)
    if unknown:
        raise UsageError(
            f"data.path: unknown option {', '.join(sorted(unknown))} in {path!r}; "
            f"known: {', '.join(OPTIONS)}"
        )
    import datasets

    with _bars_on_terminals_only():
        parts = _by_split(name, _open(name, options.get("config"), options.get("revision")))
        features = parts["train"].features
        image = image_column(name, features, options.get("image"))
        caption = caption_column(name, features, options)
        label = caption or label_column(name, features, options.get("label"))
        parts = _same_columns(name, parts, [image, label, options.get("site")])
        table = datasets.concatenate_datasets(list(parts.values()))
    split = np.repeat(list(parts), [len(part) for part in parts.values()])
    if caption:
        rows, texts = _each_caption(table, caption)
        table, split = table.select(rows), split[rows]
    labels, class_names = _captions(texts) if caption else _classes(table, label)
    sites, site_names = _sites(name, table, options.get("site"))
    encoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return ImageSource(
        name="hub",
        images=HubImages(encoded, image, name, roots_of(name)),
        labels=labels,
        class_names=tuple(class_names),
        templates=PROMPTS["pairs" if caption else "hub"].templates,
        is_test=mask_or_none(split == "test"),
        is_validation=mask_or_none(split == "validation"),
        sites=sites,
        site_names=site_names,
        captioned=caption is not None,
    )


def _open(name: str, config: str | None, revision: str | None) -> Any:
    """What `datasets` makes of the id or path; its failures as one message."""
    import datasets

    local = Path(name).expanduser()
    is_local = local.exists()
    try:
        if is_local and any(
            (local / mark).is_file() for mark in ("dataset_dict.json", "state.json")
        ):
            check_saved_files(local)
            return datasets.load_from_disk(str(local))
        if local.suffix == ".parquet" and local.is_file():
            return datasets.load_dataset("parquet", data_files=str(local))
        if local.suffix == ".tar":  # one shard, or a pattern of them
            return datasets.load_dataset("webdataset", data_files=str(local))
        source = str(local) if is_local else name
        if is_local:
            check_named_files(local, datasets.load_dataset_builder(source, config).config)
        return datasets.load_dataset(source, config, revision=revision)
    except UsageError:
        raise
    except Exception as error:  # the library raises a score of unrelated types
        reason = (str(error) or type(error).__name__).strip().split("\n")[0]
        advice = (
            "expected a save_to_disk folder, or parquet or image files in the hub's layout"
            if is_local
            else "check the id, the network and HF_HUB_OFFLINE, or give a local path"
        )
        raise UsageError(f"data.path: cannot open {name!r}: {reason}; {advice}") from error


def _by_split(name: str, data: Any) -> dict[str, Any]:
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
        raise UsageError(f"data.path: {name} has no train split; it has {', '.join(data)}")
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


@contextlib.contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """A download shows its progress to a person, and stays out of log files."""
    import datasets

    if sys.stderr.isatty() or datasets.utils.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _each_caption(table: Any, column: str) -> tuple[np.ndarray, list[str]]:
    """The row of each caption, and the captions ("" where there is none); lists have several."""
    rows, texts = [], []
    cells = table.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    for row, found in enumerate(cells):
        for text in (found or [None]) if isinstance(found, list) else [found]:
            if text is not None and not isinstance(text, str):
                raise UsageError(f"data.path: column {column!r} holds no captions, but {text!r}")
            rows.append(row)
            texts.append((text or "").strip())
    return np.array(rows, dtype=np.int64), texts


def _captions(texts: list[str]) -> tuple[np.ndarray, list[str]]:
    """Numbers of the captions (-1 where there is none) and the distinct ones."""
    numbers, _ = numbered([text for text in texts if text])
    found = np.full(len(texts), -1, dtype=np.int64)
    found[[bool(text) for text in texts]] = numbers
    return found, list(dict.fromkeys(text for text in texts if text))


def _classes(table: Any, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class indices (-1 where unknown) and names; numbered classes keep their numbers."""
    import datasets

    indices, names = _labels(table, column)
    if isinstance(table.features[column], datasets.ClassLabel):
        return indices, tuple(map(clean_class_name, names))
    numbers, cleaned = one_class_by_name(names, f"values of the column {column!r}")
    return np.append(np.array(numbers, dtype=np.int64), -1)[indices], cleaned


def _labels(table: Any, column: str) -> tuple[np.ndarray, list[str]]:
    """Class indices (-1 where unknown) and names: a ClassLabel's own, else the sorted values."""
    import datasets

    kind = table.features[column]
    values = table.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    if isinstance(kind, datasets.ClassLabel):
        return class_numbers(values), list(kind.names)
    if not str(getattr(kind, "dtype", "")).startswith(("string", "large_string", "int", "uint")):
        raise UsageError(f"data.path: column {column!r} holds no class labels, but {kind}")
    return numbered_labels(values)


def _sites(name: str, table: Any, column: str | None) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Site of each row (-1 where unknown) and the sites' names, sorted."""
    if column is None:
        return None, ()
    if column not in table.features:
        raise UsageError(f"data.path: {name} has no column {column!r}: {listed(table.features)}")
    indices, names = _labels(table, column)
    plain = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    # An empty cell names no site, nor does a missing one, whose index is -1.
    places = [plain.index(name.strip()) if name.strip() else -1 for name in names]
    indices, names = np.array([*places, -1], dtype=np.int64)[indices], plain
    short = [Path(name).stem for name in names]
    if column == "__url__" and len(set(short)) == len(names):  # webdataset's: a site is a shard
        names = short
    return indices, tuple(names)
