"""Names of a CLIP's linear layers, and patterns that pick some of them.

A pattern is what PEFT takes for a key of `rank_pattern`: a regular expression that a layer's path
must end with, from a dot on, such as `q_proj` or `layers.3.self_attn.q_proj`. Of several patterns
the first that fits counts. Beside these, `vision_encoder` and `text_encoder` stand for a tower, as
in `vision_encoder`, `vision_encoder.fc1`, `text_encoder.layers.0-3` and
`vision_encoder.layers.11.q_proj`; layers count from 0 and a range includes both ends.

Of regular expressions, letters, classes such as `[0-3]`, `.`, `|`, groups, anchors and repetition
are offered, as far as a path is matched in a moment; `fedclip.lora.safe_regex` says how far.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TypeVar

from fedclip.errors import UsageError
from fedclip.lora.names import layer_path
from fedclip.lora.safe_regex import safe_regex

LAYERS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "out_proj": "self_attn.out_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
"""The linear layers of an encoder layer, and their paths inside it."""
TOWERS = {"vision_encoder": "vision_model", "text_encoder": "text_model"}
PROJECTIONS = {"vision_encoder": "visual_projection", "text_encoder": "text_projection"}
"""The linear layer behind each tower, which has no bias."""

_BY_TOWER = re.compile(
    rf"(?P<tower>{'|'.join(TOWERS)})"
    r"(\.layers\.(?P<first>\d{1,3})(-(?P<last>\d{1,3}))?)?"
    r"(\.(?P<name>\w+))?"
)
_OWN_ENDS = (r"\.weight$|\.bias$", r"\.lora_\w+$")

Value = TypeVar("Value")


@lru_cache(maxsize=1024)
def pattern_regex(pattern: str) -> re.Pattern[str]:
    """What a layer's whole path must match; ValueError for what is no pattern."""
    return re.compile(rf"(.*\.)?({_spelled_out(pattern)})")


def _spelled_out(pattern: str) -> str:
    """A pattern that begins with a tower as an expression for paths; others as they are."""
    found = _BY_TOWER.fullmatch(pattern)
    if found is None:
        return safe_regex(pattern)
    tower, first, last, name = found.group("tower", "first", "last", "name")
    module, projection = TOWERS[tower], PROJECTIONS[tower]
    if first is not None:
        numbers = "|".join(map(str, range(int(first), int(last or first) + 1))) or r"[^\s\S]"
        return rf"{module}\.encoder\.layers\.({numbers})\.(.+\.)?{name or '.+'}"
    if name == projection:
        return projection
    return rf"({module}|{projection})" + (rf"\.(.+\.)?{name}" if name else r"(\..+)?")


def first_hit(patterns: Mapping[str, Value], path: str, default: Value) -> Value:
    """The value of the first pattern that a layer's path fits."""
    for pattern, value in patterns.items():
        if pattern_regex(pattern).fullmatch(path):
            return value
    return default


def fits_any(patterns: Iterable[str], path: str) -> bool:
    """Whether a layer's path fits one of the patterns."""
    return any(pattern_regex(pattern).fullmatch(path) for pattern in patterns)


def check_hits(key: str, patterns: Iterable[str], paths: Iterable[str]) -> None:
    """Raise `UsageError` for a pattern that no path fits, with some of the paths."""
    known = list(paths)
    for pattern in patterns:
        try:
            regex = pattern_regex(pattern)
        except ValueError as error:
            raise UsageError(f"{key}: {error}") from None
        if not any(map(regex.fullmatch, known)):
            shown = ", ".join([*known[:2], "...", *known[-1:]] if len(known) > 3 else known)
            raise UsageError(f"{key}: nothing fits the pattern {pattern!r}; there are {shown}")


def owners(tensor: str) -> list[str]:
    """Names a pattern may match for a trainable tensor: the tensor name and its layer path.

    `["vision_model...q_proj.lora_B", "vision_model...q_proj"]` of B of an adapter.
    """
    path = layer_path(tensor)
    found = [path]
    for end in _OWN_ENDS:
        path = re.sub(end, "", path)
        if path != found[-1]:
            found.append(path)
    return found


def factor_of(patterns: Mapping[str, float], tensor: str) -> float:
    """The factor of the first pattern that a trained tensor or its layer fits; else 1."""
    for pattern, factor in patterns.items():
        regex = pattern_regex(pattern)
        if any(map(regex.fullmatch, owners(tensor))):
            return factor
    return 1.0
