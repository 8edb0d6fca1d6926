"""Loads what a name stands for: code of a row, a package or a user's file, or an object.

What is handed over goes by the name `given` in a configuration, and is known while the call that
it was handed to lasts, to that call only.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedclip.catalog import KINDS, installed, is_given, own_rows, target_of, unknown
from fedclip.errors import UsageError

_ARGUMENTS = {"data_sets": "data", "strategies": "strategy"}
_OBJECTS: ContextVar[Mapping[str, Any]] = ContextVar("given", default=MappingProxyType({}))


def load(kind: str, name: str, key: str | None = None) -> Any:
    """What a name stands for; imports its code. `key` is what an error blames.

    Raises UsageError for an unknown name, with the known ones, and for code that does not load.
    """
    row, key = KINDS[kind].rows.get(name), key or KINDS[kind].key
    if row is not None:
        return target_of(row.target)
    if is_given(kind, name):
        return given_object(kind, name, key)
    if name in (own := own_rows(kind)):
        return own[name]
    if found := installed(kind).get(name):
        return _from_package(kind, found, key)
    if wrong := unknown(kind, name):
        raise UsageError(f"{key} must be {wrong[0]}, got {name!r}{wrong[1]}")
    return _from_file(name, key, KINDS[kind].word)


@contextmanager
def giving(objects: Mapping[str, Any]) -> Iterator[None]:
    """A context in which these objects, by kind of the catalogue, are what `given` means."""
    before = _OBJECTS.set(objects)
    try:
        yield
    finally:
        _OBJECTS.reset(before)


def given_object(kind: str, name: str, key: str) -> Any:
    """The object; UsageError where none was handed over, as of a name in a file."""
    if kind in _OBJECTS.get():
        return _OBJECTS.get()[kind]
    argument = _ARGUMENTS[kind]
    also = ", or fedclip.evaluate(folder, data=...)" if argument == "data" else ""
    raise UsageError(
        f"{key}: {name} stands for what is handed over in Python, which no file can name; begin a "
        f"run by fedclip.run(config, {argument}=...), go on with one by "
        f"fedclip.resume(folder, {argument}=...){also}"
    )


def _from_file(name: str, key: str, word: str) -> Any:
    """What `path/to/file.py:Name` stands for; runs the file. `word` says what one expects."""
    import importlib.util

    file, _, attribute = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{key}: there is no file {file}")
    # A name that no other module has; dataclasses look their module up by it.
    own_name = f"_fedclip_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()}"
    spec = importlib.util.spec_from_file_location(own_name, path)
    sys.modules[own_name] = module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except (Exception, SystemExit) as error:
        del sys.modules[own_name]
        raise UsageError(f"{key}: {file} cannot be loaded: {error!r}") from error
    if hasattr(module, attribute):
        return getattr(module, attribute)
    raise UsageError(f"{key}: {file} has no {word} {attribute}")


def _from_package(kind: str, found: list[Any], key: str) -> Any:
    where = sorted(f"{p.value} of {p.dist.name if p.dist else '?'}" for p in found)
    if len(found) > 1:
        raise UsageError(
            f"{key}: {found[0].name} is provided more than once, as {' and '.join(where)}, in the "
            f"entry points fedclip.{kind}; uninstall all but one of these packages"
        )
    try:
        return found[0].load()
    except (Exception, SystemExit) as error:
        name = f"{found[0].name}, which is {where[0]},"
        raise UsageError(f"{key}: {name} cannot be loaded: {error!r}") from error
