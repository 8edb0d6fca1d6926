"""What a key expects, in words: for error messages and for the reference page."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedclip.config.section import Named


def expected(field: FieldInfo) -> str:
    """Say what values a field takes: `a whole number from 1 to 64`."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "expected" in extra:
        return str(extra["expected"])
    return _kind(field.annotation, list(field.metadata))


def expected_item(field: FieldInfo) -> str:
    """Say what values an item of a list, or a value by pattern, takes."""
    annotation = field.annotation
    if get_origin(annotation) is dict:
        return _kind(get_args(annotation)[1], [])
    found = _find_list(annotation)
    return expected(field) if found is None else _kind(get_args(found)[0], [])


def _find_list(annotation: Any) -> Any:
    """The first list among the parts of an annotation, through unions and Annotated."""
    if get_origin(annotation) is tuple:
        return annotation
    return next(filter(None, map(_find_list, get_args(annotation))), None)


def _kind(annotation: Any, metadata: list[Any]) -> str:
    if get_origin(annotation) is typing.Annotated:
        inner, *more = get_args(annotation)
        return _kind(inner, [*_flat(more), *metadata])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [a for a in get_args(annotation) if a is not type(None)]
        words = " or ".join(_kind(kind, metadata) for kind in kinds)
        return words + (" or null" if type(None) in get_args(annotation) else "")
    if get_origin(annotation) is Literal:
        values = [str(value) for value in get_args(annotation)]
        return values[0] if len(values) == 1 else "one of " + ", ".join(values)
    if get_origin(annotation) is tuple:
        return f"a list ({_kind(get_args(annotation)[0], [])})"
    if get_origin(annotation) is dict:
        inner = get_args(annotation)[1]
        if _model(inner):
            return "a mapping of names to mappings"
        return f"a mapping of patterns ({_kind(inner, [])})"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a mapping with the keys " + ", ".join(annotation.model_fields)
    names = {bool: "true or false", int: "a whole number", float: "a number"}
    return names.get(annotation, _text(metadata)) + _bounds(metadata)


def _flat(metadata: list[Any]) -> Iterator[Any]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from item.metadata
        else:
            yield item


def _text(metadata: list[Any]) -> str:
    named = [m.func.expected for m in metadata if isinstance(getattr(m, "func", None), Named)]
    if named:
        return str(named[0])
    patterns = [m.pattern for m in metadata if getattr(m, "pattern", None)]
    return "text with {} in it once" if any(r"\{\}" in p for p in patterns) else "text"


def _bounds(metadata: list[Any]) -> str:
    low = high = ""
    for item in metadata:
        match item:
            case annotated_types.Ge(ge=value):
                low = "> 0" if is_sanity_bound(value) else f">= {value}"
            case annotated_types.Gt(gt=value):
                low = f"> {value}"
            case annotated_types.Le(le=value) if not is_sanity_bound(value):
                high = f"<= {value}"
            case annotated_types.Lt(lt=value):
                high = f"< {value}"
    if low.startswith(">=") and high.startswith("<="):
        return f" from {low[3:]} to {high[3:]}"
    return " " + " and ".join(bound for bound in (low, high) if bound) if low or high else ""


def is_sanity_bound(value: Any) -> bool:
    """Whether a bound is only there to catch mistakes; it is named where it is crossed."""
    return 0 < value <= 1e-3 or value >= 100


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key below a model with its field, sections included, in order."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        section = section_of(field)
        if section:
            yield from known_keys(section, f"{prefix}{name}.")


def section_of(field: FieldInfo | None) -> type[BaseModel] | None:
    """The model of a key that is a mapping, else None."""
    return _model(field.annotation if field else None)


def named_section_of(field: FieldInfo | None) -> type[BaseModel] | None:
    """The model of every value of a key that maps names to mappings, as `tasks` does, else None."""
    kind = field.annotation if field else None
    return _model(get_args(kind)[1]) if get_origin(kind) is dict else None


def section_at(model: type[BaseModel], path: str) -> type[BaseModel] | None:
    """The model at a path such as `model.lora` or `tasks.digits`, else None."""
    section: type[BaseModel] | None = model
    named: type[BaseModel] | None = None
    for part in path.split(".") if path else ():
        if named is not None:
            section, named = named, None
            continue
        field = section.model_fields.get(part) if section else None
        section, named = section_of(field), named_section_of(field)
    return section


def key_path(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """The key that an error's place names; pydantic's names for parts of a union are left out."""
    path = ""
    inside: type[BaseModel] | None = model
    named: type[BaseModel] | None = None
    by_pattern = False
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif named is not None:
            path += f".{part}"
            inside, named = named, None
        elif inside is not None:
            path += f".{part}" if path else part
            field = inside.model_fields.get(part)
            inside, named = section_of(field), named_section_of(field)
            by_pattern = field is not None and get_origin(field.annotation) is dict
        elif by_pattern:
            return f"{path}[{part}]"
    return path


def with_default(loc: Sequence[int | str], model: type[BaseModel]) -> tuple[str, ...]:
    """The parts of an error's place up to the key whose default can stand in for its value.

    A section for which another default is set than what its keys have is replaced whole.
    """
    if not loc:
        return ()
    name, *inner = str(loc[0]), *loc[1:]
    field = model.model_fields.get(name)
    section, named = section_of(field), named_section_of(field)
    if field and section and inner and field.default == section():
        return (name, *with_default(inner, section))
    if named and inner[1:] and inner[1] != "[key]":
        return (name, str(inner[0]), *with_default(inner[1:], named))
    return (name,)


def _model(kind: Any) -> type[BaseModel] | None:
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


SYNONYMS = {
    "algorithm": ("federation.strategy",),
    "aggregation": ("federation.strategy",),
    "alpha": ("model.lora.lora_alpha",),
    "backbone": ("model.model_name",),
    "clients": ("federation.num_clients",),
    "dataset": ("data.name",),
    "dropout": ("model.lora.lora_dropout",),
    "epochs": ("client.local_epochs",),
    "epsilon": ("privacy.target_epsilon",),
    "fedprox": ("client.proximal_mu",),
    "fraction_fit": ("federation.clients_per_round",),
    "lr": ("client.learning_rate", "optimizer.learning_rate"),
    "mu": ("client.proximal_mu",),
    "num_rounds": ("federation.rounds",),
    "num_sites": ("federation.num_clients",),
    "rank": ("model.lora.r",),
    "sites": ("federation.num_clients",),
}
"""What others call the same keys, too unlike in spelling to be found by it."""


def nearest(key: str, root: type[BaseModel]) -> str | None:
    """The known key that an unknown one most likely meant."""
    keys = [known for known, _ in known_keys(root)]
    parent, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == parent}
    meant = SYNONYMS.get(name.casefold(), ())
    if here := [k for k in meant if k.rpartition(".")[0] == parent and k in keys]:
        return here[0]
    # The right name in the wrong place: `lora.r` instead of `model.lora.r`.
    elsewhere = [k for k in keys if f".{k}".endswith(f".{key}") or k.rpartition(".")[2] == name]
    if not elsewhere and meant and meant[0] in keys:
        return meant[0]
    if close := difflib.get_close_matches(name, siblings, n=1, cutoff=0.6):
        return siblings[close[0]]
    return max(elsewhere, key=lambda k: difflib.SequenceMatcher(a=key, b=k).ratio(), default=None)
