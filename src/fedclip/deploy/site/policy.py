"""What a site takes part in, and what it checks before it joins."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fedclip.config import Config
from fedclip.data.decode import decode, describe_bad
from fedclip.data.picture_sizes import median_size
from fedclip.data.picture_types import in_words
from fedclip.data.source import ImageSource
from fedclip.data.sources.imagefolder import imagefolder
from fedclip.deploy.job import EPSILON
from fedclip.deploy.site.config import PolicyConfig, SiteConfig
from fedclip.deploy.site.requirements import promised
from fedclip.errors import UsageError, shortened
from fedclip.records import State

CLOCKS_APART = 240.0
"""Seconds by which clocks may differ; Flower refuses a site from 300 on."""


class Against(UsageError):
    """What a site does not take part in; the text goes to the coordinator."""


def check_job(policy: PolicyConfig, job: Mapping[str, Any], config: Config) -> None:
    """Raises Against for a job that the site's policy forbids."""
    for name in str(job.get("strategy")).split("+"):
        if policy.strategies is not None and name not in policy.strategies:
            raise Against(
                f"its policy does not allow {name} (allowed: {', '.join(policy.strategies)})"
            )
    limits = (
        ("rounds", config.federation.rounds, policy.most_rounds),
        ("local epochs", config.client.local_epochs, policy.most_local_epochs),
    )
    for what, asked, most in limits:
        if most is not None and asked > most:
            raise Against(f"its policy allows {most} {what}, the run has {asked}")
    largest, told = policy.largest_epsilon, job.get(EPSILON)
    if largest is not None and not promised(job) <= largest:
        raise Against(
            f"its policy asks for differential privacy with an epsilon of at most {largest:g}, "
            f"the run promises {'none' if told is None else shortened(told)}"
        )


def check_adapter(policy: PolicyConfig, trained: State) -> None:
    """Raises Against for more trained values than the site's policy allows."""
    megabytes = sum(4 * tensor.numel() for tensor in trained.values()) / 1e6
    if megabytes > policy.largest_adapter_mb:
        raise Against(
            f"its policy allows an adapter of {policy.largest_adapter_mb:g} MB, this one has "
            f"{megabytes:.1f} MB"
        )


def check_clock(theirs: float, now: float | None = None) -> None:
    """Raises Against where the coordinator's clock is too far from this one."""
    apart = (time.time() if now is None else now) - theirs
    if abs(apart) > CLOCKS_APART:
        raise Against(f"its clock differs from the coordinator's by {apart:.0f} s")


def preflight(config: SiteConfig, every_image: bool = False) -> dict[str, Any]:
    """Checks what can be checked before joining; gives the facts, raises UsageError with all else.

    `every_image` is decoded, or else the first of each class.

    Model and classes are compared with the coordinator's when it says which they are, before the
    first round.
    """
    troubles: list[str] = []
    facts: dict[str, Any] = {"site": config.name}
    try:
        source = imagefolder(config.data.path, "classes")
        facts |= {"images": len(source), "classes": list(source.class_names)}
        facts |= _decoded(source, config, troubles, every_image)
    except UsageError as error:
        troubles.append(str(error))
    state = Path(config.state)
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(state, os.W_OK):
            raise PermissionError("it is not writable")
        facts["free_disk_gb"] = round(shutil.disk_usage(state).free / 1e9, 1)
        if facts["free_disk_gb"] < config.free_disk_gb:
            troubles.append(
                f"state: {facts['free_disk_gb']} GB are free at {state}, free_disk_gb asks for "
                f"{config.free_disk_gb:g}"
            )
    except OSError as error:
        troubles.append(f"state: {state} cannot be used: {error}")
    facts["free_memory_gb"] = round(psutil.virtual_memory().available / 1e9, 1)
    if facts["free_memory_gb"] < config.free_memory_gb:
        troubles.append(
            f"{facts['free_memory_gb']} GB of memory are free, free_memory_gb asks for "
            f"{config.free_memory_gb:g}"
        )
    if config.model is not None and not Path(config.model).is_dir():
        troubles.append(f"model: there is no folder {config.model}")
    if troubles:
        raise UsageError("\n".join(troubles))
    return facts


def _decoded(
    source: ImageSource, config: SiteConfig, troubles: list[str], every_image: bool
) -> dict[str, Any]:
    """Facts of images that were decoded; damaged ones are trouble where they are not skipped."""
    first = np.unique(source.labels, return_index=True)[1]
    _, bad = decode(
        source,
        np.arange(len(source)) if every_image else first,
        lambda images: np.zeros((len(images), 1, 1, 1), dtype=np.uint8),
        "preflight",
    )
    total = len(source) if every_image else len(first)
    if bad and (config.data.on_bad_image == "error" or len(bad) == total):
        troubles.append(f"data.path: {describe_bad(bad, total)}")
    size = median_size(source.images, np.arange(len(source)))
    facts: dict[str, Any] = {"median_image": size and "{} x {}".format(*size)}
    if not every_image:
        return facts
    facts |= {"damaged": describe_bad(bad, total) if bad else "none"}
    return facts | {"passed_over": in_words(source.passed_over) or "none"}
