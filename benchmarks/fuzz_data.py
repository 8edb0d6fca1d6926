"""Damaged data: tables of pairs, and the cache of decoded pixels."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

from benchmarks.fuzz_damage import (
    VALUES,
    Damaged,
    as_json,
    in_bytes,
    in_json,
    in_lines,
    in_place_of,
)
from benchmarks.fuzz_runs import workplace
from fedclip.config.loading import config_from_dict
from fedclip.data.cache import BAD, DIGESTS, PIXELS
from fedclip.data.decode import decode
from fedclip.data.source import ArrayImages, ImageSource
from fedclip.data.sources.pairs import pairs
from fedclip.experiment.survey import survey
from fedclip.files import file_sha256
from fedclip.reports.listener import Listener

COLUMNS = ("image", "caption", "site", "split")
ROWS = [
    (f"images/{i}.png", text, ("oslo", "bonn", "")[i % 3], ("train", "train", "test", "val")[i % 4])
    for i, text in enumerate(
        ("a cat", 'a "red" car, parked', "ein Hund", "一只猫", "a dog; asleep", "chat noir", "b\tc")
        * 2
    )
]


@dataclass(frozen=True)
class Table:
    """A damaged table, and whether the whole data set is looked at."""

    file: Path
    survey: bool


def make_table(rng: random.Random, place: Path) -> Table:
    """A table of pairs, damaged: its bytes, rows, cells, columns or encoding."""
    suffix = rng.choice([".csv", ".tsv", ".jsonl"])
    data = _jsonl(rng) if suffix == ".jsonl" else _csv(rng, "\t" if suffix == ".tsv" else ",")
    match rng.randrange(10):
        case 0 | 1 | 2:
            data = in_bytes(rng, data)
        case 3:
            data = (in_lines if suffix == ".jsonl" else in_bytes)(rng, data)
        case 4:
            encoding = rng.choice(["utf-16", "utf-8-sig", "utf-32", "gb18030", "latin-1"])
            data = data.decode(errors="replace").encode(encoding, "replace")
        case 5:
            data = data.replace(b"\r\n", rng.choice([b"\n", b"\r", b"\n\n", b"\r\r\n"]))
    shutil.rmtree(place / "pairs", ignore_errors=True)
    shutil.copytree(_images(), place / "pairs")
    file = place / "pairs" / f"table{suffix}"
    file.write_bytes(data)
    if rng.random() < 0.02:
        in_place_of(rng, file)
    return Table(file, survey=rng.random() < 0.05)


def read_table(case: Table) -> None:
    """Reads pairs; each row must come out as another reader has it."""
    source = pairs(str(case.file))
    found = [
        (
            source.images.path_of(i),
            source.class_names[source.labels[i]],
            ""
            if source.sites is None or source.sites[i] < 0
            else source.site_names[source.sites[i]],
            _split(source, i),
        )
        for i in range(len(source))
    ]
    expected = list(_rows(case.file))
    if [row[1:] for row in found] != [row[1:] for row in expected]:
        raise Damaged("pairs: other rows than the table has")
    if any(not path.endswith(row[0]) for (path, *_), row in zip(found, expected, strict=True)):
        raise Damaged("pairs: other images than the table has")
    if case.survey:
        survey(
            config_from_dict(
                {
                    "task": "contrastive",
                    "model": {"model_name": "random:tiny"},
                    "data": {"name": "pairs", "path": str(case.file)},
                    "federation": {"num_clients": 2},
                }
            ),
            Listener(),
        )


def make_cache(rng: random.Random, place: Path) -> Path:
    """The folder of a pixel cache with damaged files; now and then with digests that fit."""
    shutil.rmtree(place / "cache", ignore_errors=True)
    shutil.copytree(_cache(), place / "cache")
    (folder,) = (place / "cache").iterdir()
    if rng.random() < 0.2:
        (folder / BAD).write_bytes(_bad(rng, b'[[3, "no"]]'))
        digests = {name: file_sha256(folder / name) for name in (PIXELS, BAD)}
        (folder / DIGESTS).write_text(json.dumps(digests))
        return place / "cache"
    for name in rng.sample((PIXELS, BAD, DIGESTS), rng.choice([1, 1, 2])):
        path = folder / name
        if rng.random() < 0.1:
            in_place_of(rng, path)
        else:
            damage = {PIXELS: in_bytes, BAD: _bad, DIGESTS: in_json}[name]
            path.write_bytes(damage(rng, path.read_bytes()))
    return place / "cache"


def read_cache(folder: Path) -> None:
    """Decodes with a damaged cache: the pixels must be the right ones."""
    whole = {path.name: path.read_bytes() for path in next(iter(_cache().iterdir())).iterdir()}
    with patch.dict(os.environ, {"FEDCLIP_CACHE": str(folder)}):
        pixels, bad = _decode()
    if not np.array_equal(pixels, _pixels()):
        raise Damaged("a cache gives other pixels")
    (there,) = (path for path in folder.iterdir() if not path.name.startswith("."))
    if bad and whole[BAD] == (there / BAD).read_bytes():
        raise Damaged("a cache names other damaged images")


def _decode() -> tuple[Any, Any]:
    source = ImageSource(
        "noise", ArrayImages(_noise(), "noise"), np.zeros(12, np.int64), ("a",), ("{}",)
    )
    return decode(
        source,
        np.arange(12),
        lambda images: np.stack([np.asarray(image).transpose(2, 0, 1) for image in images]),
        "fuzz",
        memory_gb=0.0,
        content_key="noise",
    )


@cache
def _noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)


def _pixels() -> np.ndarray:
    return _noise().transpose(0, 3, 1, 2)


@cache
def _cache() -> Path:
    place = workplace() / "cache"
    with patch.dict(os.environ, {"FEDCLIP_CACHE": str(place)}):
        _decode()
    return place


@cache
def _images() -> Path:
    place = workplace() / "pairs"
    (place / "images").mkdir(parents=True)
    for i in range(len(ROWS)):
        Image.fromarray(_noise()[i % 12]).save(place / "images" / f"{i}.png")
    return place


def _bad(rng: random.Random, data: bytes) -> bytes:
    rows = [[rng.choice([*VALUES, 3, 12, 99]), rng.choice([*VALUES, "no"])] for _ in range(2)]
    return rng.choice([as_json(rows), in_json(rng, b'{"a": [[0, "x"]]}'), in_bytes(rng, data)])


def _jsonl(rng: random.Random) -> bytes:
    rows: list[dict[str, Any]] = [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]
    lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5).encode() for row in rows]
    for at in rng.sample(range(len(lines)), rng.choice([0, 1, 2])):
        lines[at] = in_json(rng, lines[at])
    return b"".join(line + b"\r\n" for line in lines)


def _csv(rng: random.Random, delimiter: str) -> bytes:
    columns, rows = list(COLUMNS), [list(row) for row in ROWS]
    for _ in range(rng.choice([0, 1, 2])):
        row = rng.choice(rows)
        at = rng.randrange(max(1, len(row)))
        match rng.randrange(6) if len(row) > 1 else 2:
            case 0:
                row[at] = str(rng.choice(VALUES)).encode("utf-8", "replace").decode()
            case 1:
                columns[rng.randrange(len(columns))] = rng.choice([*COLUMNS, "", " image", "Image"])
            case 2:
                row.append(rng.choice(["x", ""]))
            case 3:
                del row[at:]
            case 4:
                columns.append(rng.choice([*COLUMNS, "x", "", "x"]))
            case 5:
                row[at] = rng.choice(
                    ['"', "a\nb", "\0", "'", "a\r", "../x.png", "/etc/passwd", ","]
                )
    text = StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([columns, *rows])
    return text.getvalue().encode()


def _rows(file: Path) -> Iterator[tuple[str, ...]]:
    """The table as another reader has it: image, caption, site, split; strict about types."""
    text = file.read_bytes().decode("utf-8-sig")
    if file.suffix == ".jsonl":
        records = [_record(line) for line in StringIO(text, newline="") if line.strip()]
    else:
        table = list(csv.reader(StringIO(text, newline=""), delimiter=_delimiter(file)))
        table = [row for row in table if row]
        known = [name for name in table[0] if name in COLUMNS]
        if len(set(known)) < len(known):
            raise Damaged("pairs: two columns of one name")
        records = [dict(zip(table[0], row, strict=False)) for row in table[1:]]
    for record in records:
        site, split = record.get("site"), record.get("split")
        if not isinstance(site, str | int | None) or isinstance(site, bool):
            raise Damaged("pairs: a site that is no name")
        if not isinstance(split, str | None):
            raise Damaged("pairs: a split that is no name")
        kind = {"val": "validation"}.get((split or "").strip().lower(), (split or "train").strip())
        name = "" if site is None else str(site).strip()
        yield (
            Path(record["image"].strip()).as_posix(),
            record["caption"].strip(),
            name,
            kind.lower(),
        )


def _record(line: str) -> dict[str, Any]:
    def once(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(found)) < len(found):
            raise Damaged("pairs: a key stands twice")
        return dict(found)

    found: dict[str, Any] = json.loads(line, object_pairs_hook=once)
    return found


def _delimiter(file: Path) -> str:
    return "\t" if file.suffix == ".tsv" else ","


def _split(source: ImageSource, index: int) -> str:
    if source.is_test is not None and source.is_test[index]:
        return "test"
    held = source.is_validation is not None and source.is_validation[index]
    return "validation" if held else "train"
