"""Configuration in and out: YAML files, overrides, mappings; every error reported at once."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from fedclip.config.checks import cross_problems, lookup
from fedclip.config.model import ModelConfig
from fedclip.config.tree import Config
from fedclip.config.wording import (
    expected,
    expected_item,
    key_path,
    nearest,
    section_at,
)
from fedclip.errors import FedclipWarning, UsageError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

M = TypeVar("M", bound=BaseModel)

RATES = ("client.learning_rate", "optimizer.learning_rate")

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
    values, lines = read_yaml(Path(path)) if path is not None else ({}, {})
    changes, typed = parse_overrides(overrides)
    values = _resolved(deep_merge(values, changes), str(path or "command line"))
    source = Source(str(path) if path is not None else "command line", lines, typed)
    return validated(Config, values, source)


def config_from_dict(values: Mapping[str, Any], source: str = "configuration") -> Config:
    """Check a configuration given as nested mappings."""
    return validated(Config, values, Source(source))


def validate_model(values: Mapping[str, Any], source: str = "configuration") -> ModelConfig:
    """Check the `model` part of a configuration on its own."""
    return validated(ModelConfig, values, Source(source))


def dump_config(config: Config) -> str:
    """Write a configuration as YAML that `load_config` reads back unchanged."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read a mapping from a YAML file, with the line of every key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"there is no configuration file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as a text file: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        # OmegaConf's reader takes `1e-4` for the number that it is; PyYAML's does not.
        values = OmegaConf.to_container(OmegaConf.create(text)) if node is not None else None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UsageError(_syntax_message(path, error)) from None
    if node is None:
        raise UsageError(f"{path} is empty; a configuration is a mapping such as `seed: 0`")
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise UsageError(
            f"{path} must hold a mapping of keys such as `seed: 0`, "
            f"not {'a list' if isinstance(node, yaml.SequenceNode) else 'a single value'}"
        )
    return _text_keys(values), dict(_lines(node))


def _syntax_message(path: Path, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
    start = getattr(error, "context_mark", None)
    if mark and start and start.line != mark.line:
        problem += f" (in what begins in line {start.line + 1})"
    return f"{where}: this is not valid YAML: {problem}; check indentation, brackets and quotes"


def _lines(node: yaml.MappingNode, prefix: str = "") -> list[tuple[str, int]]:
    found = []
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        found.append((name, key.start_mark.line + 1))
        if isinstance(value, yaml.MappingNode):
            found += _lines(value, f"{name}.")
    return found


def _text_keys(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {str(key): _text_keys(value) for key, value in values.items()}
    return values


def parse_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Turn `a.b=value` texts into nested mappings, and tell how each key was typed.

    A learning rate given under one of its two keys is given under both.
    """
    values: dict[str, Any] = {}
    typed: dict[str, str] = {}
    problems = []
    for text in overrides:
        key, equals, _ = text.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            problems.append(f"{text!r} must have the form key=value, such as federation.rounds=5")
            continue
        try:
            change = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
        except (yaml.YAMLError, OmegaConfBaseException):
            problems.append(f"{text!r}: the value is not valid YAML; check brackets and quotes")
            continue
        values = deep_merge(values, _text_keys(change))
        typed[key] = text
    rates = {key: lookup(values, key) for key in RATES}
    given = {key: rate for key, rate in rates.items() if rate is not None}
    if len(given) == 2 and len(set(map(str, given.values()))) == 2:
        both = " and ".join(typed.get(key, key) for key in given)
        problems.append(f"{both} differ, but both mean the local learning rate; give one of them")
    if problems:
        raise UsageError(_report([f"{problem} (command line)" for problem in problems]))
    if any(key in typed for key in RATES) or given:
        rate = next(iter(given.values()), None)
        for key in RATES:
            section, name = key.split(".")
            if isinstance(values.get(section, {}), dict):
                values = deep_merge(values, {section: {name: rate}})
                typed.setdefault(key, next(iter(typed[k] for k in RATES if k in typed), key))
    return values, typed


def deep_merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one nested mapping over another; lists and values are replaced whole."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = deep_merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _resolved(values: dict[str, Any], source: str) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(OmegaConf.create(values), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UsageError(f"{str(error).splitlines()[0]} ({source})") from None


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
    problems: dict[str, str] = {}  # key path -> message
    config = None
    values = _numbers(values)
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            key = key_path(detail["loc"], model)
            # A bad item also makes pydantic find the list too short; the item says enough.
            if not any(known.startswith(f"{key}[") for known in problems):
                problems.setdefault(key, _sentence(key, detail, model))
    if model is Config and isinstance(values, Mapping):
        defaults = Config().model_dump()
        if any(lookup(values, key) is not None for key in RATES):
            defaults = deep_merge(
                defaults, {key.split(".")[0]: {"learning_rate": None} for key in RATES}
            )
        if isinstance(lookup(values, "model.lora.target_modules"), Mapping):
            del defaults["model"]["lora"]["target_modules"]  # what is given replaces all of it
        crossed = cross_problems(deep_merge(defaults, values))
        if crossed:
            problems.pop("", None)
        for problem in crossed:
            problems.setdefault(problem.key, problem.text)
    if config is None or problems:
        raise UsageError(_report([f"{text} ({source.of(key)})" for key, text in problems.items()]))
    _advise(config, source)
    return config


def _report(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)


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
    return f"{key} must be {wanted}, got {_shown(detail['input'])}"


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
