"""Overrides, `key=value` texts of the command line, and values that refer to other keys."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedclip.config.section import lookup
from fedclip.config.strict_yaml import MAX_DEPTH, NotReadable, parse_yaml, plain_value
from fedclip.errors import UsageError

RATES = ("client.learning_rate", "optimizer.learning_rate")

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")


def parse_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Turn `a.b=value` texts into nested mappings, and tell how each key was typed.

    A learning rate given under one of its two keys is given under both.
    """
    values: dict[str, Any] = {}
    typed: dict[str, str] = {}
    problems = []
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        parts = key.split(".")
        if not equals or not all(parts) or len(parts) > MAX_DEPTH:
            problems.append(f"{text!r} must have the form key=value, such as federation.rounds=5")
            continue
        try:
            change = override_value(value)
        except NotReadable:
            problems.append(f"{text!r}: the value is not valid YAML; check brackets and quotes")
            continue
        change = _emptied(change)
        for part in reversed(parts):
            change = {part: change}
        values = deep_merge(values, change)
        typed[key] = text
    rates = {key: lookup(values, key) for key in RATES}
    given = {key: rate for key, rate in rates.items() if rate is not None}
    if len(given) == 2 and len(set(map(str, given.values()))) == 2:
        both = " and ".join(typed.get(key, key) for key in given)
        problems.append(f"{both} differ, but both mean the local learning rate; give one of them")
    if problems:
        raise UsageError(listed([f"{problem} (command line)" for problem in problems]))
    if any(key in typed for key in RATES) or given:
        rate = next(iter(given.values()), None)
        for key in RATES:
            section, name = key.split(".")
            if isinstance(values.get(section, {}), dict):
                values = deep_merge(values, {section: {name: rate}})
                typed.setdefault(key, next(iter(typed[k] for k in RATES if k in typed), key))
    return values, typed


def override_value(text: str) -> Any:
    """The value of an override: a number, true, false, null, YAML in brackets or quotes, or a text.

    What begins with `[`, `{` or a quote must be YAML to its last character. Everything else that
    is no number or word of YAML is a text as it was typed: `my images #1`, `a: b`, `yes`.
    """
    text = text.strip()
    if not text.startswith(("[", "{", '"', "'")):
        return plain_value(text)
    if "\n" in text or _ends_in_comment(text):
        raise NotReadable("more than one value")
    return parse_yaml(text)


def _ends_in_comment(text: str) -> bool:
    """Whether YAML would drop the end of a value in brackets or quotes."""
    return not text.endswith({"[": "]", "{": "}"}.get(text[0], text[0]))


class Emptied(dict[str, Any]):
    """A mapping that takes the place of the one below it, as an override `key={}` asks."""


def _emptied(value: Any) -> Any:
    """An override's value, whose empty mappings are meant as such."""
    if not isinstance(value, Mapping):
        return value
    return {key: _emptied(inner) for key, inner in value.items()} if value else Emptied()


def deep_merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one nested mapping over another; lists and values are replaced whole."""
    merged = Emptied(base) if isinstance(base, Emptied) else dict(base)
    for key, value in change.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        below = both and not isinstance(value, Emptied)
        merged[key] = deep_merge(old, value) if below else value  # type: ignore[arg-type]
    return merged


def with_references(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Put the values of other keys in the place of `${key}`; they refer to no further ones."""

    def filled(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: filled(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [filled(inner) for inner in value]
        if not isinstance(value, str) or "${" not in value:
            return value
        if whole := _REFERENCE.fullmatch(value):
            return target(whole)
        return _REFERENCE.sub(lambda part: str(target(part)), value)

    def target(reference: re.Match[str]) -> Any:
        found = lookup(values, reference[1])
        if found is None or isinstance(found, Mapping | list) or "${" in str(found):
            raise UsageError(
                f"{reference[0]} must name a key that has a number, a text, true or false, "
                f"written out ({source})"
            )
        return found

    return {key: filled(value) for key, value in values.items()}


def listed(problems: Sequence[str]) -> str:
    """One problem as it is, several as a list."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)
