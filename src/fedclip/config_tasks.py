"""The `tasks` section, and how clients of several tasks, or of unlike data, share adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from fedclip.config_data import DataConfig
from fedclip.config_section import Section

TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""A task's name: part of client ids and of folder names."""


class TaskConfig(DataConfig):
    """One task of several: its images, its classes, and who has them."""

    num_clients: int | None = Field(
        None,
        ge=1,
        description="Clients of this task; `null` takes `federation.num_clients`. Clients of the "
        "same name in several tasks are one site.",
    )


class SharingConfig(Section):
    """Which clients train one adapter together."""

    mode: Literal["shared", "per_task", "shared+task", "clusters"] = Field(
        "shared",
        description="`shared`: one adapter for all; `per_task`: one for each task; `shared+task`: "
        "the first ranks for all, the rest for each task; `clusters`: one for each group of "
        "clients whose updates are alike.",
    )
    shared_rank: int | None = Field(
        None,
        ge=1,
        description="Ranks that all tasks share (shared+task); `null` takes half of `lora.r`.",
    )
    clusters: int | None = Field(
        None,
        ge=2,
        description="Groups to be found (clusters); `null` takes the number from 2 to 10 that "
        "tells them apart best, by the silhouette.",
    )
    cluster_round: int = Field(
        1,
        ge=1,
        description="Round after which groups are found, in which all clients take part "
        "(clusters).",
    )
    merge: Literal["linear", "cat", "svd", "ties", "dare", "task-arithmetic", "knots"] = Field(
        "svd",
        description="How `adapter/` is made of the groups' own at the end; see `fedclip merge`.",
    )


def laid_over(common: Mapping[str, Any], own: Any) -> Any:
    """A task's keys over those of `data`; sections inside them likewise."""
    if not isinstance(own, Mapping):
        return own
    both = {
        key: laid_over(value, own[key])
        for key, value in common.items()
        if isinstance(value, Mapping) and isinstance(own.get(key), Mapping)
    }
    return {**common, **own, **both}
