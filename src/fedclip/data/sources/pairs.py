"""Image-caption pairs from a file: a CSV or JSON-lines table, or tar shards of webdataset."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np

from fedclip.data.captions import numbered
from fedclip.data.prompts import PROMPTS
from fedclip.data.source import FileImages, ImageSource, mask_or_none, path_below
from fedclip.data.sources.hub import hub
from fedclip.data.sources.imagefolder import SPLITS
from fedclip.errors import UsageError, shortened
from fedclip.files import open_regular, parse_json

IMAGE, CAPTION, SITE, SPLIT = "image", "caption", "site", "split"
TABLES = (".csv", ".tsv", ".jsonl")


def pairs(path: str | None = None, layout: str = "auto") -> ImageSource:
    """Pairs of a table, one a row, or of `.tar` shards with NAME.jpg and NAME.txt.

    A table has the columns `image` (a path, relative to the table) and `caption`, and may have
    `site` and `split` (train, validation or test). Others are passed over. Shards may be given by
    a pattern, as `shards/*.tar`; they are read as a data set of the hub is.
    """
    if not path:
        raise UsageError(
            "data.path: pairs needs a table (.csv, .tsv or .jsonl) with the columns image and "
            "caption, or .tar shards"
        )
    if path.partition("?")[0].endswith(".tar"):
        return hub(path)
    file = Path(path).expanduser()
    if file.suffix.lower() not in TABLES:
        raise UsageError(
            f"data.path: pairs reads {', '.join(TABLES)} and .tar files, got {path!r}; for a "
            "folder of images use data.name: imagefolder, for a data set of the hub hub"
        )
    rows = list(_rows(file))
    if not rows:
        raise UsageError(f"data.path: {file} holds no pairs")
    labels, captions = numbered([caption for _, caption, _, _ in rows])
    splits = [split for _, _, _, split in rows]
    sites = [site for _, _, site, _ in rows]
    images = [Path(image).as_posix() for image, _, _, _ in rows]  # one name for one file
    repeated = len(set(images)) < len(images)
    site_names = sorted({site for site in sites if site})
    number = {site: i for i, site in enumerate(site_names)}
    return ImageSource(
        name="pairs",
        images=FileImages(file.parent, tuple(images)),
        labels=labels,
        class_names=captions,
        templates=PROMPTS["pairs"].templates,
        is_test=mask_or_none([split == "test" for split in splits]),
        is_validation=mask_or_none([split == "validation" for split in splits]),
        # An image of several captions stays on one side of a split.
        groups=numbered(images)[0] if repeated else None,
        sites=np.array([number.get(site, -1) for site in sites]) if site_names else None,
        site_names=tuple(site_names),
        captioned=True,
    )


def _rows(file: Path) -> Iterator[tuple[str, str, str, str]]:
    """Image, caption, site and split of each row, checked."""
    for line, record in _records(file):
        where = f"data.path: {file}, line {line}"
        texts = {name: _text(record.get(name), name, where) for name in (IMAGE, CAPTION)}
        path_below((file.parent,), texts[IMAGE], where.removeprefix("data.path: "))
        split = _name(record.get(SPLIT), SPLIT, where).lower() or "train"
        if split not in SPLITS:
            raise UsageError(f"{where}: split must be train, validation or test, got {split!r}")
        site = _name(record.get(SITE), SITE, where)
        yield texts[IMAGE], texts[CAPTION], site, SPLITS[split]


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        got = "an empty one" if value in (None, "") or isinstance(value, str) else repr(value)
        raise UsageError(f"{where}: every row needs a text under {name}, got {got}")
    return value.strip()


def _name(value: Any, column: str, where: str) -> str:
    """A site or a split as text; '' for none. Sites may be numbers."""
    if value is None:
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise UsageError(f"{where}: {column} must be a name, got {shortened(value)}")
    return str(value).strip()


def _records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The table's rows as mappings, each with its line."""
    try:
        with TextIOWrapper(open_regular(file), encoding="utf-8-sig", newline="") as lines:
            if file.suffix.lower() == ".jsonl":
                yield from _json_records(file, lines)
                return
            reader = csv.DictReader(
                lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True
            )
            _check_columns(file, list(reader.fieldnames or ()))
            for record in reader:
                if None in record:  # more cells than columns: an unquoted comma in a caption
                    raise UsageError(
                        f"data.path: {file}, line {reader.line_num}: more cells than columns; put "
                        "captions with a comma in double quotes"
                    )
                yield reader.line_num, record
    except FileNotFoundError:
        raise UsageError(f"data.path: there is no file {file}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"data.path: {file} cannot be read as a table: {error}") from error


def _json_records(file: Path, lines: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = parse_json(line, f"data.path: {file}, line {number}")
        if not isinstance(record, dict):
            raise UsageError(f"data.path: {file}, line {number}: expected an object, got {record}")
        _check_columns(file, list(record), f", line {number}")
        yield number, record


def _check_columns(file: Path, columns: list[str], line: str = "") -> None:
    known = [name for name in columns if name in (IMAGE, CAPTION, SITE, SPLIT)]
    if len(set(known)) < len(known):
        raise UsageError(f"data.path: {file}{line} has two columns of one name: {', '.join(known)}")
    for needed in (IMAGE, CAPTION):
        if needed not in columns:
            raise UsageError(
                f"data.path: {file}{line} has no column {needed!r}; its columns: "
                f"{', '.join(map(str, columns)) or 'none'}"
            )
