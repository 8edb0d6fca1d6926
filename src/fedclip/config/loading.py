"""Configuration in and out: YAML files, overrides, mappings; every error reported at once."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from fedclip.config.checks import cross_problems
from fedclip.config.model import ModelConfig
from fedclip.config.overrides import deep_merge, listed, parse_overrides, with_references
from fedclip.config.ready import of_name
from fedclip.config.section import SINGLE_KEYS
from fedclip.config.strict_yaml import MAX_DEPTH, dump_yaml, read_yaml
from fedclip.config.tree import Config
from fedclip.config.wording import (
    expected,
    expected_item,
    is_sanity_bound,
    key_path,
    nearest,
    section_at,
    with_default,
)
from fedclip.errors import FedclipWarning, UsageError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

M = TypeVar("M", bound=BaseModel)

MAX_PROBLEMS = 50
"""Problems that are named; a file that has more is no configuration."""

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


@dataclass(frozen=True)
class Source:
    """Where values came from, so that a message can say where to change one."""

    name: str
    lines: Mapping[str, int] = field(default_factory=dict)  # key path -> line in the file
    overrides: Mapping[str, str] = field(default_factory=dict)  # key path -> as it was typed

    def of(self, key: str) -> str:
        """Name the place of a key, or of the nearest mapping around it."""
        key = key.partition("[")[0]
        for typed in (key, *self._inside(key)):
            if typed in self.overrides:
                return f"command line: {self.overrides[typed]}"
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.name}, line {self.lines[key]}" if key else self.name

    def _inside(self, key: str) -> list[str]:
        """Overridden keys that stand above or below a key in the tree."""
        return [o for o in self.overrides if key.startswith(f"{o}.") or o.startswith(f"{key}.")]


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (or start from the defaults), lay overrides over it, and check it all."""
    if path is not None and not Path(path).exists() and (found := of_name(str(path))):
        raise UsageError(
            f"there is no file {path} here; `fedclip configs {found.name}` copies the ready one"
        )
    return load_as(Config, path, overrides)


def load_as(model: type[M], path: Path | str | None, overrides: Sequence[str] = ()) -> M:
    """The same for any model, such as a site's configuration."""
    name = "command line" if path is None else str(path)
    values, lines = ({}, {}) if path is None else read_yaml(Path(path))
    changes, typed = parse_overrides(overrides)
    values = with_references(deep_merge(values, changes), name)
    return validated(model, values, Source(name, lines, typed))


def config_from_dict(values: Mapping[str, Any], source: str = "configuration") -> Config:
    """Check a configuration given as nested mappings."""
    return validated(Config, _numbers(values), Source(source))


def validate_model(values: Mapping[str, Any], source: str = "configuration") -> ModelConfig:
    """Check the `model` section of a configuration alone."""
    return validated(ModelConfig, _numbers(values), Source(source))


def dump_config(config: Config) -> str:
    """Write a configuration as YAML that `load_config` reads back unchanged."""
    return dump_yaml(config.model_dump(mode="json"))


def _numbers(values: Any) -> Any:
    """Plain numbers: of numpy's, and of `1e-4`, which YAML 1.1 readers such as PyYAML call text."""
    if isinstance(values, Mapping):
        return {key: _numbers(value) for key, value in values.items()}
    if isinstance(values, str) and _EXPONENT.fullmatch(values):
        return float(values)
    if isinstance(values, Real) and not isinstance(values, bool | int | float):
        return int(values) if isinstance(values, Integral) else float(values)
    return values


def validated(model: type[M], values: Any, source: Source) -> M:
    """Build a model, or raise one error that lists everything that is wrong."""
    read, details, invalid = _read(model, values)
    problems: dict[str, str] = {}  # key path -> message
    for detail in details[:MAX_PROBLEMS]:
        key = key_path(detail["loc"], model)
        # A bad item also makes pydantic find the list too short; the item says enough.
        if not any(known.startswith(f"{key}[") for known in problems):
            problems.setdefault(key, _sentence(_shortened(key), detail, model))
    if len(details) > MAX_PROBLEMS:
        problems["..."] = f"and {len(details) - MAX_PROBLEMS} more"
    for problem in cross_problems(read) if isinstance(read, Config) else ():
        if not problem.follows(invalid):
            problems.setdefault(problem.key, problem.text)
    if read is None or problems:
        raise UsageError(listed([f"{text} ({source.of(key)})" for key, text in problems.items()]))
    _advise(read, source)
    return read


def _read(model: type[M], values: Any) -> tuple[M | None, list[ErrorDetails], set[str]]:
    """A model, with defaults in the place of invalid keys; their errors, and these keys.

    None where there is too much to put in its place.
    """
    details: list[ErrorDetails] = []
    invalid: set[str] = set()
    for _ in range(MAX_DEPTH):  # what a section's keys are together shows when each is valid
        try:
            return model.model_validate(values, context=SINGLE_KEYS), details, invalid
        except ValidationError as error:
            found = error.errors(include_url=False)
        details = details or found
        if len(found) > MAX_PROBLEMS:
            break
        for place in (with_default(detail["loc"], model) for detail in found):
            invalid.add(".".join(place))
            values = _without(values, place)
    return None, details, invalid


def _without(values: Any, place: Sequence[str]) -> Any:
    """The same values without a key."""
    if not place or not isinstance(values, Mapping):
        return {}
    name, inner = place[0], place[1:]
    if inner and name in values:
        return {**values, name: _without(values[name], inner)}
    return {key: value for key, value in values.items() if str(key) != name}


def _sentence(key: str, detail: ErrorDetails, model: type[BaseModel]) -> str:
    path, item, _ = key.partition("[")
    parent, _, name = path.rpartition(".")
    section = section_at(model, parent)
    if detail["type"] == "extra_forbidden" and section:
        removed = getattr(section, "removed_keys", {}).get(name)
        if removed:
            return f"{key} was removed: {removed.instead} (got {_shown(detail['input'])})"
        hint = nearest(key, model)
        known = ", ".join(section.model_fields)
        where = f"known keys under {parent}" if parent else "known keys"
        return f"unknown key {key}" + (f"; did you mean {hint}?" if hint else f"; {where}: {known}")
    if path and name == "":  # a key of a mapping of names
        named, shown = parent.partition(".")[0], _shown(detail["input"])
        return f"names under {named} are letters, digits, `-`, `_` and `.`, got {shown}"
    if detail["type"] == "unknown_name":
        return f"{key} {detail['msg']}"
    if detail["type"] == "value_error":
        return f"{key}: {detail['ctx']['error']}" if key else str(detail["ctx"]["error"])
    known_field = section.model_fields.get(name) if section else None
    if known_field is None:
        return (
            f"{key or 'a configuration'} must be a mapping of keys, got {_shown(detail['input'])}"
        )
    wanted = expected_item(known_field) if item else expected(known_field)
    return f"{key} must be {wanted}{_sanity_bound(detail)}, got {_shown(detail['input'])}"


def _shortened(key: str) -> str:
    return key if len(key) <= 200 else f"{key[:197]}..."


def _sanity_bound(detail: ErrorDetails) -> str:
    """The bound that a value crosses, where what is expected does not name it."""
    for name, words in (("le", "at most"), ("ge", "at least")):
        bound = detail.get("ctx", {}).get(name)
        if bound is not None and is_sanity_bound(bound) and detail["input"] > 0:
            return f" ({words} {bound:,})" if isinstance(bound, int) else f" ({words} {bound:g})"
    if detail["type"] == "string_too_long":
        return f" of {detail['ctx']['max_length']:,} characters at most"
    return " in UTF-8" if detail["type"] == "string_unicode" else ""


def _shown(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    shown = f"the text {value!r}" if isinstance(value, str) else repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _advise(config: BaseModel, source: Source) -> None:
    """Warn of values that are allowed but seldom wise."""
    model, prefix = (config.model, "model.") if isinstance(config, Config) else (config, "")
    if not isinstance(model, ModelConfig):
        return
    lora = model.lora
    if model.trains == "lora" and not lora.r <= lora.lora_alpha <= 2 * lora.r:
        key = f"{prefix}lora.lora_alpha"
        message = (
            f"{key} is usually 1 to 2 times r ({lora.r} to {2 * lora.r}), "
            f"got {lora.lora_alpha:g} ({source.of(key)})"
        )
        warnings.warn(message, FedclipWarning, stacklevel=4)
