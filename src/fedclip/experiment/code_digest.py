"""Digest of a class that exists in memory only: of its compiled code and its plain values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import CodeType, FunctionType
from typing import Any


def class_sha256(own: Any) -> str:
    """Digest of a class, or of an object's class and its attributes.

    It covers methods, their defaults and closures, and class attributes, also of its base classes
    outside fedclip; not what the methods call. Source text is not needed, which a class typed into
    an interpreter does not have.
    """
    found = own if isinstance(own, type) else type(own)
    parts: list[Any] = [
        [base.__qualname__, _attributes(vars(base))]
        for base in found.__mro__
        if base is not object and base.__module__.partition(".")[0] not in ("fedclip", "abc")
    ]
    if found is not own:
        parts.append(_attributes({k: v for k, v in vars(own).items() if k != "setting"}))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _attributes(values: Mapping[str, Any]) -> list[Any]:
    functions = (FunctionType, staticmethod, classmethod, property)
    kept = {k: v for k, v in values.items() if isinstance(v, functions) or k[:2] != "__"}
    return [[name, _method(value)] for name, value in sorted(kept.items())]


def _method(value: Any) -> Any:
    """A function with its defaults and closure; anything else as a value."""
    if isinstance(value, property):
        return [_method(one) for one in (value.fget, value.fset, value.fdel)]
    function = getattr(value, "__func__", value)
    if not isinstance(function, FunctionType):
        return _value(function)
    cells = [_value(cell.cell_contents) for cell in function.__closure__ or ()]
    return [_value(function), _value(function.__defaults__), _value(function.__kwdefaults__), cells]


def _value(value: Any) -> Any:
    """What tells a value from another, the same in every process."""
    if isinstance(value, FunctionType):
        return _value(value.__code__)
    if isinstance(value, CodeType):
        return [value.co_code.hex(), value.co_names, [_value(one) for one in value.co_consts]]
    if isinstance(value, tuple | list):
        return [_value(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(_value(one)) for one in value)
    if isinstance(value, Mapping):
        return sorted(repr((_value(key), _value(one))) for key, one in value.items())
    if isinstance(value, int | float | complex | str | bytes | None):
        return value
    return type(value).__qualname__
