"""What the sections share: their base class, patterns, and problems across keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from fedclip.catalog import choices, rows_without, unknown
from fedclip.config.names import no_twins, site_name
from fedclip.lora.layer_patterns import pattern_regex

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


_HOST = re.compile(r"[\w.:%-]{1,253}")
_PORT = re.compile(r"[0-9]{1,5}")


def _printable(text: str) -> str:
    if _CONTROL.search(text):
        raise ValueError(f"must be one line without control characters, got {text[:80]!r}")
    return text


# What can only be a mistake is outside of these bounds, with room for whatever may be meant.
Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_printable)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Times = Annotated[int, Field(ge=1, le=1_000_000)]
"""Rounds, epochs, clients, examples of a batch."""
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
"""Examples of a data set."""
Rate = Annotated[float, Field(ge=1e-12, le=1000)]
"""A learning rate."""
Weight = Annotated[float, Field(ge=0, le=10_000)]
"""The weight of a term, such as weight decay."""
OwnWeight = Annotated[float, Field(gt=0, le=10_000)]
"""The weight of a term that is left out by `null`, not by 0."""
Share = Annotated[float, Field(ge=1e-6, le=1)]
PartShare = Annotated[float, Field(ge=1e-6, lt=1)]
"""A share that is not all."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
"""A share that may be nothing, and is not all."""
Seconds = Annotated[float, Field(ge=0.001, le=100_000_000)]
Megabytes = Annotated[float, Field(ge=0.001, le=100_000_000)]
Gigabytes = Annotated[float, Field(ge=1e-9, le=1_000_000)]
Space = Annotated[float, Field(ge=0, le=1_000_000)]
"""Gigabytes that may be none."""
# A list in YAML is a tuple here, so that no two parts of a run can share one list and change it.
AsTuple = Field(strict=False)


def split_address(text: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[::1]:port`; ValueError for anything else."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    fits = colon and _HOST.fullmatch(host) and (bracketed or ":" not in host)
    if not fits or not _PORT.fullmatch(port) or not 1 <= int(port) <= 65535:
        raise ValueError(
            f'must be a host and a port, such as "coordinator.example.org:8000", got "{text[:80]}"'
        )
    return host, int(port)


def each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names; ValueError where one stands twice."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"must name each once, got {name} more than once")
    return names


def _address(text: str) -> str:
    split_address(text)
    return text


HostPort = Annotated[Text, AfterValidator(_address)]


def _pattern(text: str) -> str:
    pattern_regex(text)
    return text


MAX_PATTERNS = 1000
"""Patterns of one key: each is tried on every layer."""
Pattern = Annotated[Text, AfterValidator(_pattern)]
"""A pattern of layers: see `fedclip.lora.layer_patterns`."""

SiteName = Annotated[str, AfterValidator(site_name)]
"""A site's name, by the rule of `fedclip.config.names`."""
SiteNames = Annotated[tuple[SiteName, ...], AsTuple, Field(min_length=1), AfterValidator(no_twins)]


@dataclass(frozen=True)
class Removed:
    """A key that was removed: the default it had, which is still read, and what replaces it."""

    default: Any
    instead: str

    def keeps(self, value: Any) -> bool:
        """Whether a value is the old default, written as it was: no 0 for false."""
        return type(value) is type(self.default) and value == self.default


@dataclass(frozen=True)
class Named:
    """A validator: a name of a kind of the catalogue, or one of `also`.

    Rows of which the field `without` holds are none.
    """

    kind: str
    also: tuple[str, ...] = ()
    without: str = ""

    def __call__(self, name: str) -> str:
        """The name; an error says which there are."""
        wrong = unknown(self.kind, name, self.also, self.without)
        if wrong:
            text = f"must be {wrong[0]}, got the text {name!r}{wrong[1]}"
            raise PydanticCustomError("unknown_name", "{text}", {"text": text})
        return name

    @property
    def expected(self) -> str:
        """The names that need no further package, in words."""
        return choices(self.kind, [*self.also, *rows_without(self.kind, self.without)])


class Section(BaseModel):
    """One mapping of the configuration: typed, closed to unknown keys, unchangeable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    removed_keys: ClassVar[Mapping[str, Removed]] = {}

    @model_validator(mode="before")
    @classmethod
    def _leave_out_removed_keys(cls, data: Any) -> Any:
        """Pass over keys of older versions at their defaults; other values stay, and are refused.

        So files and run folders written by older versions are still read.
        """
        if not isinstance(data, Mapping):
            return data
        removed = cls.removed_keys
        return {k: v for k, v in data.items() if k not in removed or not removed[k].keeps(v)}


SINGLE_KEYS = "single keys"
"""The context of a validation that leaves the checks across keys out."""


@dataclass(frozen=True)
class CrossProblem:
    """Keys that do not fit together: the one to blame first, and what to say.

    `keys`: the others whose defaults could be to blame, which stand in for invalid values.
    """

    key: str
    text: str
    keys: tuple[str, ...] = ()

    def on(self, *keys: str) -> CrossProblem:
        """The same, where it depends on further keys."""
        return replace(self, keys=(*self.keys, *keys))

    def follows(self, invalid: Iterable[str]) -> bool:
        """Whether it may be due to the defaults of invalid keys or sections."""
        keys = (self.key, *self.keys)
        return any(key == one or key.startswith(f"{one}.") for one in invalid for key in keys)


def lookup(values: Any, key: str) -> Any:
    """Value at `a.b.c`, or None where the way there ends."""
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return None
        values = values[part]
    return values
