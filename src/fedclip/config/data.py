"""The sections `data` and `tasks`: images, classes and their division over clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from fedclip.config.section import (
    AsTuple,
    Count,
    Fraction,
    Named,
    PartShare,
    Section,
    Seed,
    Space,
    Text,
    Times,
)

Template = Annotated[Text, Field(pattern=r"^(?:[^{]|\{[^}])*\{\}(?:[^{]|\{[^}])*$")]


class PartitionConfig(Section):
    """How one data set is divided over clients."""

    name: Literal["auto", "iid", "dirichlet", "pathological", "shard", "natural", "size"] = Field(
        "auto",
        description="`auto` is `natural` (one client a site) where the data has sites, "
        "else `dirichlet`.",
    )
    alpha: Annotated[float, Field(ge=1e-4, le=1e6)] = Field(
        0.5, description="Dirichlet concentration: the smaller, the more unlike the clients."
    )
    min_size: Count = Field(2, description="Fewest examples a client may get (dirichlet).")
    classes_per_client: Times = Field(2, description="Classes a client sees (pathological).")
    shards_per_client: Times = Field(2, description="Shards a client gets (shard).")
    size_skew: Literal["linear", "square", "exponential"] = Field(
        "linear", description="How sizes grow from client to client (size)."
    )


class DataConfig(Section):
    """The images, their classes and their division."""

    name: Annotated[str, AfterValidator(Named("data_sets"))] = Field(
        "digits", description="Data set; `pairs` are images with captions."
    )
    path: Text | None = Field(
        None,
        description="The folder of `imagefolder`; the hub id or local path of `hub`; the table "
        "(.csv, .tsv, .jsonl) or .tar shards of `pairs`.",
    )
    layout: Literal["auto", "classes", "sites"] = Field(
        "auto", description="What the folder's first level means (imagefolder)."
    )
    class_names: Annotated[tuple[Text, ...], AsTuple] | None = Field(
        None, min_length=1, description="Class names; `null` takes the data set's own."
    )
    templates: Annotated[tuple[Template, ...], AsTuple] | None = Field(
        None,
        min_length=1,
        description="Prompts with `{}` for the class name; `null` takes the data set's own.",
    )
    batch_size: Times = Field(32, description="Examples in one forward pass.")
    accumulation_steps: Times = Field(
        1, description="Batches whose gradients make one optimizer step: memory is spared."
    )
    augment: Literal["none", "affine"] = Field(
        "none", description="`affine`: training images moved, turned and scaled a little."
    )
    max_train_examples: Count | None = Field(
        None,
        description="Train on about this many examples at most, over all clients.",
    )
    train_classes: PartShare | Annotated[tuple[Text, ...], AsTuple, Field(min_length=1)] | None = (
        Field(
            None,
            description="Train on these classes only, and test the others too (base to new): a "
            "share, the first ones in order, or names; `null` takes all.",
            json_schema_extra={
                "expected": "a share between 0 and 1, a list of class names, or null (all)"
            },
        )
    )
    test_sites: PartShare | Annotated[tuple[Text, ...], AsTuple, Field(min_length=1)] | None = (
        Field(
            None,
            description="Sites that nobody trains on, and whose images are the central test set: a "
            "share, the last ones in order, or names; `null` holds none out.",
            json_schema_extra={
                "expected": "a share between 0 and 1, a list of sites, or null (none)"
            },
        )
    )
    shots: Count | None = Field(
        None,
        description="Few-shot learning: train on this many images of each class, over all "
        "clients, and keep at most 4 of each for validation; `null` takes all.",
    )
    validation_fraction: Fraction = Field(
        0.1, description="Share of a client's examples kept for tuning and choosing."
    )
    test_fraction: Fraction = Field(0.2, description="Share of a client's examples kept for tests.")
    test_seed: Seed | None = Field(
        None,
        description="Seed of the choice of test images: runs of other seeds then share one test "
        "set, of which none of them trains on an image. `null` takes `seed`.",
    )
    on_bad_image: Literal["error", "skip"] = Field(
        "skip", description="What an unreadable image does; it is reported by path either way."
    )
    on_empty_site: Literal["error", "skip"] = Field(
        "error", description="What a site without images does."
    )
    memory_gb: Space = Field(
        4.0, description="Decoded images above this go to a memory-mapped cache on disk."
    )
    partition: PartitionConfig = Field(PartitionConfig(), description="Division over clients.")


TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
"""A task's name: part of client ids and of folder names."""


class TaskConfig(DataConfig):
    """One task of several: its images, its classes, and who has them."""

    num_clients: Times | None = Field(
        None,
        description="Clients of this task; `null` takes `federation.num_clients`. Clients of the "
        "same name in several tasks are one site.",
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
