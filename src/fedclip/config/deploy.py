"""The `deploy` section: a federation over several machines, as its coordinator sees it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedclip.config.section import (
    HostPort,
    Megabytes,
    Seconds,
    Section,
    Share,
    SiteNames,
    Text,
    Times,
)


class DeployConfig(Section):
    """Sites on other machines (`fedclip coordinate`); `fedclip run` reads `quorum` alone of it."""

    address: HostPort = Field(
        "127.0.0.1:8000",
        description="Where the coordinator listens: host and port; `0.0.0.0:8000` is all of the "
        "machine's addresses.",
    )
    keys: Text | None = Field(
        None,
        description="The coordinator's folder of keys; `null`: no encryption, on this machine "
        "alone.",
    )
    sites: SiteNames | None = Field(
        None,
        description="Names of the sites that take part; `null`: all that have a key, or "
        "`federation.num_clients` of them where there are no keys.",
    )
    join_deadline: Seconds = Field(
        600.0, description="Seconds to wait for all sites before the first round."
    )
    round_deadline: Seconds = Field(
        3600.0, description="Seconds after which a round goes on with what has come."
    )
    quorum: Times | Share = Field(
        0.5,
        description="Sites that must answer: a number or a share of those asked. In a simulation, "
        "clients whose update can be used.",
        json_schema_extra={"expected": "a whole number >= 1 (sites), or a share up to 1.0"},
    )
    attempts: Times = Field(
        3, description="How often a round is tried before the run stops for want of a quorum."
    )
    up: Literal["fp32", "fp16", "int8"] = Field(
        "fp32",
        description="Format of what sites send; fp16 and int8 with error feedback.",
    )
    down: Literal["fp32", "fp16"] = Field("fp32", description="Format of what sites are sent.")
    largest_message_mb: Megabytes = Field(
        256.0, description="A site that sends a larger message is cut off."
    )
    largest_update: Annotated[float, Field(gt=1, le=1e9)] | None = Field(
        None,
        description="An update more than so many times the others' is left out; norms are compared "
        "by the root of the steps taken. `null`: 10, and no limit where updates are masked.",
    )
    test_data: bool = Field(
        True,
        description="The coordinator has the data set that `data` names, and tests on it; "
        "`false`: it has no images, and `data.class_names` says which classes there are.",
    )
