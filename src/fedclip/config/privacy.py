"""The `privacy` section: what is promised, to which unit, at which cost."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedclip.config.section import Section


class PrivacyConfig(Section):
    """Differential privacy of a run; the page on privacy says what it promises."""

    unit: Literal["example", "client"] | None = Field(
        None,
        description="Whose presence the run hides: one `example` of a client (DP-SGD), or a whole "
        "`client` (a noisy mean); `null` promises nothing. There is no usual one.",
    )
    target_epsilon: Annotated[float, Field(ge=1e-4, le=100)] | None = Field(
        None,
        description="The run's epsilon, which it stays below; the noise follows from it. This or "
        "`noise_multiplier`.",
    )
    noise_multiplier: Annotated[float, Field(ge=1e-4, le=10_000)] | None = Field(
        None,
        description="Standard deviation of the noise, as a multiple of `clip_norm`; epsilon "
        "follows from it.",
    )
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Probability with which the promise may fail: below one over the number of a "
        "client's examples, or of clients. Needed with `unit`.",
    )
    clip_norm: Annotated[float, Field(ge=1e-9, le=1e9)] = Field(
        1.0,
        description="Norm to which each example's gradient, or each client's update, is clipped.",
    )
    clip_quantile: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="With `unit: client`, the share of updates that shall be shorter than the clip "
        "norm, which follows them from `clip_norm` on (Andrew et al. 2021); `null` keeps it.",
    )
    reproducible: bool = Field(
        False,
        description="Noise and batches follow from `seed`, for research: no guarantee, as "
        "everybody who knows the seed can take the noise away.",
    )
    tell: bool = Field(
        False,
        description="Write what is outside the guarantee (figures of single clients, losses) to "
        "`told.jsonl`.",
    )
