"""Strict YAML: mappings, lists, texts, numbers, true, false and null, and nothing else.

YAML 1.1, which PyYAML speaks, and YAML 1.2 read some plain words differently: `yes` and `off` are
truth values in one, `1:30` is 90, `010` is 8, `1_000` a thousand, `2024-01-01` a date. Here all of
these are texts, as they look; a key that wants a number then says so. `1e-4` is a number.
Tags (`!!int`) are refused, and so are keys given twice, files that are not UTF-8, and documents
that are deep or, by their aliases, far larger than they look.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedclip.errors import UsageError

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_VALUES = 100_000
"""Values of a document, those behind aliases counted each time that they are used."""
MAX_DIGITS = 300

_PLAIN, _TEXT = "plain", "tag:yaml.org,2002:str"
_MAPPING, _LIST = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"
_ODD = "this is not valid YAML for a configuration: "
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **{
        sign + word: float(f"{sign}inf")
        for sign in ("", "+", "-")
        for word in (".inf", ".Inf", ".INF")
    },
}
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)", re.ASCII)
_FRACTION = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", re.ASCII)


class NotReadable(ValueError):
    """Why a text is not the YAML that is read here, with the line and column where known."""

    def __init__(self, problem: str, mark: yaml.Mark | None = None) -> None:
        super().__init__(problem)
        self.mark = mark


def plain_value(text: str) -> Any:
    """What an unquoted word means: null, true, false, a number, or a text."""
    if text in _WORDS:
        return _WORDS[text]
    whole = _WHOLE.fullmatch(text)
    if whole is None and _FRACTION.fullmatch(text) is None:
        return text
    if len(text) > MAX_DIGITS:
        raise NotReadable(f"{_ODD}a number of {len(text)} digits")
    return int(text) if whole else float(text)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read a mapping from a YAML file, with the line of every key."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"there is no configuration file {path}") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        raise UsageError(f"{path} cannot be read as a text file: {error}") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path} is larger than {MAX_BYTES / 1e6:g} MB; is it a configuration?")
    try:
        node = _compose(text)
        if node is None:
            raise UsageError(f"{path} is empty; a configuration is a mapping such as `seed: 0`")
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(
                f"{path} must hold a mapping of keys such as `seed: 0`, "
                f"not {'a list' if isinstance(node, yaml.SequenceNode) else 'a single value'}"
            )
        return _Values().of(node), dict(_lines(node))
    except NotReadable as error:
        at = f", line {error.mark.line + 1}, column {error.mark.column + 1}" if error.mark else ""
        raise UsageError(f"{path}{at}: {error}; check indentation, brackets and quotes") from None


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Write plain values as YAML that is read back unchanged, here and by other readers."""
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, sort_keys=False)


def parse_yaml(text: str) -> Any:
    """The value of one YAML document; `NotReadable` says what is wrong with it."""
    node = _compose(text)
    return None if node is None else _Values().of(node)


class _Loader(yaml.SafeLoader):
    """Composes nodes whose tags say no more than plain, quoted, mapping or list."""

    depth = 0

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return _PLAIN if implicit[0] else _TEXT
        return _MAPPING if kind is yaml.MappingNode else _LIST

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotReadable(f"{_ODD}values are nested too deep", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes all that is a number or a word to one reader or another, and has no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.Node:
        style = None if isinstance(plain_value(data[:MAX_DIGITS]), str) else "'"
        # Line breaks to YAML, which between any other marks are read back as spaces.
        style = '"' if set(data) & set("\x85\u2028\u2029") else style
        return self.represent_scalar(_TEXT, data, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def _compose(text: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except NotReadable:
        raise
    except yaml.MarkedYAMLError as error:
        problem, mark, start = error.problem, error.problem_mark, error.context_mark
        if mark and start and start.line != mark.line:
            problem = f"{problem} (in what begins in line {start.line + 1})"
        raise NotReadable(f"this is not valid YAML: {problem or error.context}", mark) from None
    except Exception as error:  # PyYAML's scanner lets ValueError and others through
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise NotReadable(f"this is not valid YAML: {first}") from None


class _Values:
    """Turns nodes into values, and counts them."""

    def __init__(self) -> None:
        self._left = MAX_VALUES

    def of(self, node: yaml.Node, depth: int = 0) -> Any:
        self._left -= 1
        if depth > MAX_DEPTH:  # an alias that stands inside of what it names
            raise NotReadable(f"{_ODD}values are nested too deep", node.start_mark)
        if self._left < 0:
            raise NotReadable(f"{_ODD}more than {MAX_VALUES:,} values", node.start_mark)
        if node.tag not in (_PLAIN, _TEXT, _MAPPING, _LIST):
            raise NotReadable(f"{_ODD}no tags such as {node.tag!r}", node.start_mark)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.of(item, depth + 1) for item in node.value]
        try:
            return plain_value(node.value) if node.tag == _PLAIN else node.value
        except NotReadable as error:
            raise NotReadable(str(error), node.start_mark) from None

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or self.of(key) is None:
                raise NotReadable(f"{_ODD}a key must be a word or a text", key.start_mark)
            made = self.of(value, depth + 1)
            if key.value == "<<" and key.tag == _PLAIN:
                merged = _merged(made, value) | merged
            elif key.value in values:
                raise NotReadable(f"{_ODD}duplicate key {key.value}", key.start_mark)
            else:
                values[key.value] = made
        return merged | values


def _merged(value: Any, node: yaml.Node) -> dict[str, Any]:
    """What a merge key brings: one mapping, or several of which the first counts."""
    parts = value if isinstance(value, list) else [value]
    together: dict[str, Any] = {}
    for part in reversed(parts):
        if not isinstance(part, Mapping):
            raise NotReadable(f"{_ODD}<< takes a mapping, or a list of mappings", node.start_mark)
        together |= part
    return together


def _lines(node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, int]]:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        yield name, key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _lines(value, f"{name}.")
