"""Digests of the code and the inputs of a measurement, by which stale figures are found."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fedclip
from fedclip.config.strict_yaml import read_yaml

# What decides which figures a run gives; the rest of the package shows, checks or carries them.
ROOMS = ("data", "evaluation", "experiment", "federated", "lora", "models", "seeding.py")
_SHOWS = ("bench",)


@functools.cache
def code_digests(package: Path = Path(fedclip.__file__).parent) -> dict[str, str]:
    """A digest of each room's statements: comments, docstrings and layout do not count."""
    return {room.removesuffix(".py"): _of_room(package / room) for room in ROOMS}


def input_digests(files: Iterable[Path], root: Path) -> dict[str, str]:
    """A digest of what each YAML file says, by its path below `root`."""
    return {
        file.resolve().relative_to(root.resolve()).as_posix(): _short(_canonical(file))
        for file in files
        if file.resolve().is_relative_to(root.resolve())
    }


def _of_room(place: Path) -> str:
    sources = [place] if place.is_file() else sorted(place.rglob("*.py"))
    kept = [s for s in sources if not set(s.relative_to(place).parts) & {*_SHOWS}]
    parts = [f"{s.relative_to(place)}\n{_statements(s.read_text('utf-8'))}" for s in kept]
    return _short("\n".join(parts))


def _statements(source: str) -> str:
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body[:1] = [] if len(node.body) > 1 else [ast.Pass()]
    return ast.unparse(tree)


def _canonical(file: Path) -> str:
    values: dict[str, Any] = read_yaml(file)[0]
    return json.dumps(values, sort_keys=True)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
