"""Code and data from outside the package: of a user's file, or handed over in Python.

What is handed over goes by the name `given` in a configuration, and is known while the call that
it was handed to lasts, to that call only.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedclip.errors import UsageError

GIVEN = "given"
"""The name of data in memory; of a class `given:Name`."""

_ARGUMENTS = {"data_sets": "data", "strategies": "strategy"}
_OBJECTS: ContextVar[Mapping[str, Any]] = ContextVar("given", default=MappingProxyType({}))


@contextmanager
def giving(objects: Mapping[str, Any]) -> Iterator[None]:
    """A context in which these objects, by kind of the catalogue, are what `given` means."""
    before = _OBJECTS.set(objects)
    try:
        yield
    finally:
        _OBJECTS.reset(before)


def is_given(kind: str, name: str) -> bool:
    """Whether a name of this kind stands for an object handed over in Python."""
    return kind in _ARGUMENTS and re.fullmatch(rf"{GIVEN}(:\w+)?", name) is not None


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


def in_file(name: str) -> bool:
    """Whether a name is `path/to/file.py:Name`."""
    return re.fullmatch(r".+\.py:\w+", name) is not None


def from_file(name: str, key: str, word: str) -> Any:
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
