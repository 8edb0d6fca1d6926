"""`policy.require`: what a run must promise before a site takes part."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedclip.deploy.job import EPSILON
from fedclip.errors import shortened

MASKED = "masked"
_EPSILON = re.compile(r"epsilon\s*<=\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)")
_BASE = re.compile(r"base_sha256\s*=\s*([0-9a-fA-F]{64})")
_EXPECTED = "masked, epsilon<=NUMBER (above 0) or base_sha256=DIGEST (64 hexadecimal digits)"


@dataclass(frozen=True)
class Requirement:
    """One requirement: masked sums, an epsilon of at most `most`, or a base of this `digest`."""

    kind: Literal["masked", "epsilon", "base_sha256"]
    most: float = math.inf
    digest: str = ""


def parse_requirement(text: str) -> Requirement:
    """Read one requirement; ValueError for anything that is not understood."""
    words = text.strip()
    if words == MASKED:
        return Requirement("masked")
    if (found := _EPSILON.fullmatch(words)) and 0 < (most := float(found[1])) < math.inf:
        return Requirement("epsilon", most=most)
    if found := _BASE.fullmatch(words):
        return Requirement("base_sha256", digest=found[1].lower())
    raise ValueError(f"must be {_EXPECTED}, got {shortened(text)}")


def unmet(require: Sequence[str], job: Mapping[str, Any], base: str) -> str | None:
    """What the policy requires and a job with this base does not promise, in words; None if all."""
    for one in map(parse_requirement, require):
        if one.kind == "masked" and not is_masked(job):
            return "its policy requires masked sums (secure.aggregation: masked), the run has none"
        if one.kind == "epsilon" and not promised(job) <= one.most:
            told = "none" if promised(job) == math.inf else f"{promised(job):g}"
            return (
                f"its policy requires differential privacy with epsilon<={one.most:g}, the run "
                f"promises {told}"
            )
        if one.kind == "base_sha256" and base != one.digest:
            return (
                f"its policy requires the base model with sha256 {one.digest[:16]}..., the run has "
                f"{base[:16]}..."
            )
    return None


def promised(job: Mapping[str, Any]) -> float:
    """The epsilon that a job promises; infinity where it promises none that can be."""
    value: Any = job.get(EPSILON)
    return float(value) if type(value) in (int, float) and 0 <= value < 1e9 else math.inf


def is_masked(job: Mapping[str, Any]) -> bool:
    """Whether the coordinator is to see nothing but sums over sites."""
    places: list[Any] = [job, job.get("config")]
    sections = [place.get("secure") for place in places if isinstance(place, Mapping)]
    return any(isinstance(s, Mapping) and s.get("aggregation") == MASKED for s in sections)
