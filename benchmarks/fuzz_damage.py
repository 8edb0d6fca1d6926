"""Ways to damage a file: its bytes, the JSON, lines or tensors in it, or the file itself."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

Damage = Callable[[random.Random, bytes], bytes]

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e308, 5e-324, 2**31, 2**63, 2**64, 10**40, ""),
    *("x", "0", "nan", "null", "../..", "/etc/passwd", "\0", "é", "\u202e", "[/x]", "x" * 5000),
    *([], {}, [None], [[]], {"": 0}, {"a": {"b": [1]}}, [1, "a", None], "\ud800", "client-0"),
    *(float("nan"), float("inf"), float("-inf")),
)
DEEP = {"a little deep": 70, "very deep": 3000}
"""Texts that stand for so many lists in each other."""
_PIECES = (
    *(b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b'"', b",", b":"),
    *(b"\n", b"\r", b"\t", b"null", b"NaN", b"1e999", b"-", b"9" * 400, b"9" * 5000, b"\\u", b"'"),
    *(b"\xed\xa0\x80", b"\xc3", b"\xe2\x80\xa8", b"[" * 3000, b'{"a":' * 2000, b"\\ud800"),
)


class Damaged(Exception):
    """Something damaged was accepted as something else than it was."""


def in_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bits flipped, pieces cut, put in, doubled, moved or overwritten, the end lost."""
    made = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(made) + 1)
        size = rng.choice([1, 1, 2, 4, 16, 200, 4096])
        match rng.randrange(8):
            case 0 | 1 if made:
                made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
            case 2:
                made[at:at] = rng.choice(_PIECES)
            case 3:
                del made[at : at + size]
            case 4:
                made[at:at] = made[at : at + size]
            case 5:
                made[at : at + size] = bytes(rng.randrange(256) for _ in range(min(size, 200)))
            case 6:
                other = rng.randrange(len(made) + 1)
                made[at : at + size] = made[other : other + size]
            case 7:
                del made[at:]
    return bytes(made)


def in_tree(rng: random.Random, tree: Any) -> Any:
    """A tree of JSON with values of other kinds, keys gone, added, renamed or exchanged."""
    tree = deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(tree))
        if not places or rng.random() < 0.03:
            return rng.choice(VALUES)
        where, key = rng.choice(places)
        other, second = rng.choice(places)
        match rng.randrange(8):
            case 0:
                where.pop(key)
            case 1:
                where[key] = [where[key]]
            case 2:
                where[key], other[second] = deepcopy(other[second]), deepcopy(where[key])
            case 3 if isinstance(where, dict):
                where[str(key) + rng.choice(["x", " ", "\0", "é"])] = where.pop(key)
            case 4 if isinstance(where[key], int | float) and not isinstance(where[key], bool):
                where[key] += rng.choice([1, -1, 0.5, 1e-9, 1e300])
            case 5 if isinstance(where, list):
                where.insert(key, where[key])
            case 6:
                where[key] = rng.choice(list(DEEP))
            case _:
                where[key] = rng.choice(VALUES)
    return tree


def in_json(rng: random.Random, data: bytes) -> bytes:
    """A JSON file with a damaged tree, a key that stands twice, or damaged bytes."""
    match rng.randrange(5):
        case 0:
            return in_bytes(rng, data)
        case 1:
            return twice(rng, data)
    return as_json(in_tree(rng, json.loads(data)))


def in_lines(rng: random.Random, data: bytes) -> bytes:
    """Lines of JSON: lost, doubled, exchanged, cut, or one of them damaged."""
    lines = data.splitlines(keepends=True)
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(7):
        case 0:
            del lines[at]
        case 1:
            lines.insert(other, lines[at])
        case 2:
            lines[at], lines[other] = lines[other], lines[at]
        case 3:
            lines[at] = lines[at][: rng.randrange(len(lines[at]))]
        case 4:
            lines[at] = rng.choice([b"\n", b"5\n", b"{}\n", b"[]\n", b"null\n", b"\xff\n"])
        case 5:
            return in_bytes(rng, data)
        case 6:
            lines[at] = in_json(rng, lines[at].strip()) + b"\n"
    return b"".join(lines)


def in_yaml(rng: random.Random, data: bytes) -> bytes:
    """A YAML file with damaged values or bytes."""
    if rng.random() < 0.5:
        return in_bytes(rng, data)
    # JSON is YAML; its numbers and texts come out as they are.
    return as_json(in_tree(rng, yaml.safe_load(data)))


def in_tensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with damaged bytes, header or metadata, or tensors exchanged."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    match rng.randrange(6):
        case 0:
            return in_bytes(rng, data)
        case 1 | 2:
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        case 3:
            header = in_tree(rng, header)
        case 4:  # two tensors of one shape under each other's name
            names = [name for name in header if name != "__metadata__"]
            one = rng.choice(names)
            alike = [n for n in names if header[n]["shape"] == header[one]["shape"]]
            other = rng.choice(alike)
            header[one], header[other] = header[other], header[one]
        case 5:
            at = rng.randrange(max(1, len(body) - 4))
            huge = rng.choice([float("nan"), float("inf"), 1e38, -1e38, 0.0])
            body[at // 4 * 4 : at // 4 * 4 + 4] = struct.pack("<f", huge)
    text = as_json(header)
    return struct.pack("<Q", len(text)) + text + bytes(body)


def in_place_of(rng: random.Random, path: Path) -> None:
    """What is no such file stands in a file's place, or nothing."""
    path.unlink()
    match rng.randrange(7):
        case 0:
            pass
        case 1:
            path.touch()
        case 2:
            path.mkdir()
        case 3:
            os.mkfifo(path)
        case 4:
            path.symlink_to(path.name)
        case 5:
            path.symlink_to("/dev/zero")
        case 6:
            path.symlink_to("/dev/null")


def twice(rng: random.Random, data: bytes) -> bytes:
    """An object whose text has one of its keys a second time, with another value."""
    tree = json.loads(data)
    key = rng.choice(list(tree))
    extra = as_json({key: rng.choice(VALUES)})[1:-1]
    whole = as_json(tree)
    return rng.choice([b"{" + extra + b"," + whole[1:], whole[:-1] + b"," + extra + b"}"])


def as_json(tree: Any) -> bytes:
    """The text of a tree, in which DEEP stands for what lies deep in itself."""
    text = json.dumps(tree)
    for marker, depth in DEEP.items():
        text = text.replace(json.dumps(marker), "[" * depth + "0" + "]" * depth)
    return text.encode()


def copied(source: Path, target: Path) -> Path:
    """A fresh copy of a folder in place of what a case before left there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
    return target


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every value of a tree, as the mapping or list that holds it and its key."""
    if not isinstance(tree, dict | list):
        return
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        yield from _places(value)
