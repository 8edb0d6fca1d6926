"""A site's configuration: its name, its images, and the runs that it takes part in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fedclip.config.data import DataConfig
from fedclip.config.loading import load_as
from fedclip.config.section import (
    AsTuple,
    HostPort,
    Megabytes,
    OwnWeight,
    Section,
    SiteName,
    Space,
    Text,
    Times,
)
from fedclip.deploy.site.requirements import parse_requirement


class SiteDataConfig(Section):
    """The site's images, which never leave it."""

    path: Text = Field("images", description="A folder `<class>/*`.")
    classes: dict[Text, Text] = Field(
        {}, description="Which class of the run a folder is, where that is not its name."
    )
    on_bad_image: Literal["error", "skip"] = Field(
        "skip", description="What an unreadable image does."
    )
    memory_gb: Space = Field(4.0, description="Decoded images above this go to a cache file.")


def _requirement(text: str) -> str:
    parse_requirement(text)
    return text


Requirement = Annotated[Text, AfterValidator(_requirement)]


class PolicyConfig(Section):
    """What the site takes part in; it refuses everything else, and says why."""

    strategies: Annotated[tuple[Text, ...], AsTuple, Field(min_length=1)] | None = Field(
        None, description="Strategies that are allowed, `scaffold` and `ditto` among them."
    )
    largest_adapter_mb: Megabytes = Field(
        1000.0, description="Largest adapter that it trains, in megabytes of fp32."
    )
    most_rounds: Times | None = Field(None, description="Most rounds of a run.")
    most_local_epochs: Times | None = Field(None, description="Most epochs of a round.")
    tell_accuracy: bool = Field(
        True, description="Say at the end how many of its own test images are recognised."
    )
    approved: Text | None = Field(
        None,
        description="File of the runs that were approved here (`fedclip site approve`); all others "
        "are refused before an image is read. `null`: the first job of a run is pinned.",
    )
    require: Annotated[tuple[Requirement, ...], AsTuple] = Field(
        (),
        description="What a run must promise: `masked`, `epsilon<=NUMBER`, `base_sha256=DIGEST`.",
    )
    signed_result: bool = Field(
        False, description="Take a run's result only with a statement that the coordinator signed."
    )
    least_masked: Annotated[int, Field(ge=3, le=1_000_000)] | None = Field(
        None,
        description="The fewest sites in a masked sum that it takes part in; `null`: more than two "
        "thirds of those in its list of peers.",
    )
    when_refused: Literal["wait", "end"] = Field(
        "wait", description="What the site does once it has refused a run: wait, or end (exit 2)."
    )
    total_epsilon: OwnWeight | None = Field(
        None,
        description="The most that all private runs together may spend of these images: the sum of "
        "their epsilons, kept in the site's state; `null` leaves it to each run.",
    )
    largest_epsilon: OwnWeight | None = Field(
        None,
        description="The least privacy: takes part only in runs that promise differential "
        "privacy with an epsilon of at most this; `null` asks for no promise.",
    )


class SiteConfig(Section):
    """A site of a federation."""

    name: SiteName = Field("site", description="The name under which its key is registered.")
    coordinator: HostPort = Field("127.0.0.1:8000", description="The coordinator's host and port.")
    keys: Text | None = Field(
        None, description="The folder that `fedclip keys site` made; `null`: on one machine alone."
    )
    state: Text = Field(
        "site-state", description="A folder for what the site keeps: private state, logs."
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?|mps)$")] = Field(
        "auto", description="Where it trains."
    )
    model: Text | None = Field(
        None, description="The base model's folder here; `null`: by the name that the run has."
    )
    port: int | None = Field(
        None, ge=1, le=65535, description="A port of this machine for Flower; `null`: a free one."
    )
    resident: bool = Field(
        True, description="Keep the model in memory; `false` loads it anew for each message."
    )
    free_disk_gb: Space = Field(1.0, description="Space that must be free at the start.")
    free_memory_gb: Space = Field(1.0, description="Memory that must be free at the start.")
    data: SiteDataConfig = Field(SiteDataConfig(), description="Images.")
    policy: PolicyConfig = Field(PolicyConfig(), description="Policy.")

    @property
    def as_data(self) -> DataConfig:
        """The images as a data set of one site."""
        return DataConfig.model_validate(
            {
                "name": "imagefolder",
                "path": self.data.path,
                "layout": "classes",
                "on_bad_image": self.data.on_bad_image,
                "memory_gb": self.data.memory_gb,
                "partition": {"name": "natural"},
            }
        )


def load_site(path: Path, overrides: Sequence[str] = ()) -> SiteConfig:
    """A site's configuration file, with `key=value` changes; its paths are relative to it."""
    config = load_as(SiteConfig, path, overrides)
    here, policy = path.parent.absolute(), config.policy
    return config.model_copy(
        update={
            "keys": None if config.keys is None else str(here / config.keys),
            "state": str(here / config.state),
            "model": None if config.model is None else str(here / config.model),
            "policy": policy.model_copy(update={"approved": str(here / approved)})
            if (approved := policy.approved) is not None
            else policy,
            "data": config.data.model_copy(update={"path": str(here / config.data.path)}),
        }
    )
