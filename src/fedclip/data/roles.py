"""What each image is for: to be divided over clients, to test, to validate, or nothing."""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedclip.data.source import ImageSource, Labels, some
from fedclip.data.splits import Indices, split
from fedclip.errors import FedclipWarning, UsageError
from fedclip.seeding import seed_for

# OWN: divided over clients. TEST, VALIDATION: the data set's own splits. HELD_OUT: of sites that
# nobody trains on. UNUSED: nothing. FIXED_TEST: divided over clients, to be tested on.
OWN, TEST, VALIDATION, HELD_OUT, UNUSED, FIXED_TEST = range(6)
MOST_VALIDATION_SHOTS = 4


def roles_of(source: ImageSource) -> Labels:
    """The role of each image `[n]`: as its splits say, or as something has said since."""
    if source.roles is not None:
        return source.roles
    role = np.full(len(source), OWN, dtype=np.int64)
    if source.is_validation is not None:
        role[source.is_validation] = VALIDATION
    if source.is_test is not None:
        role[source.is_test] = TEST
    return role


def with_test_sites(source: ImageSource, chosen: float | Sequence[str]) -> ImageSource:
    """The same data set with all images of some sites held out.

    `chosen` are the sites by name, or their share: the last ones in the data set's order, rounded
    up. Images of other sites that show a held-out drawing (one group) are not used at all.
    """
    if source.sites is None:
        raise UsageError(
            f"data.test_sites needs a data set with sites, which {source.name} does not have; "
            "leave it out"
        )
    sites = _chosen(source.site_names, chosen)
    held_out = np.isin(source.sites, sites)
    roles = roles_of(source).copy()
    if source.groups is not None:
        roles[np.isin(source.groups, source.groups[held_out])] = UNUSED
    roles[held_out] = HELD_OUT
    return replace(source, roles=roles)


def _chosen(names: Sequence[str], chosen: float | Sequence[str]) -> list[int]:
    if isinstance(chosen, float):
        listed = list(names[-math.ceil(len(names) * chosen - 1e-9) :])
    else:
        listed = [unicodedata.normalize("NFC", name) for name in chosen]
    unknown = [name for name in listed if name not in names]
    if unknown:
        raise UsageError(f"data.test_sites: {some(unknown)} is no site of the data ({some(names)})")
    if set(listed) == set(names):
        raise UsageError(
            f"data.test_sites leaves none of the {len(names)} sites to train on; choose fewer"
        )
    return [names.index(name) for name in listed]


def with_shots(
    source: ImageSource,
    shots: int,
    test_fraction: float,
    seed: int,
    test_seed: int | None = None,
) -> ImageSource:
    """The same data set with `shots` training images of each class, and few for validation.

    The protocol of few-shot learning with CLIP: k labelled images of each class in all, min(k, 4)
    for validation, and the whole test set. What is missing of the data set's own splits is drawn
    from the training images first: `test_fraction` of each class for the test set, by `test_seed`
    where that is given, and validation images from what the shots leave. Images of one group never
    stand on two sides. Source: Zanella and Ben Ayed 2024, arXiv:2405.18541, section 4.
    """
    roles = roles_of(source).copy()
    pool = np.flatnonzero(roles == OWN)
    if not np.isin(roles, (TEST, HELD_OUT)).any():
        pool, _, test = split(
            pool,
            source.labels,
            source.groups,
            validation_fraction=0.0,
            test_fraction=test_fraction,
            seed=seed_for(seed if test_seed is None else test_seed, "shots", "test"),
        )
        roles[test] = TEST
    train, rest = _draw(source, pool, shots, seed_for(seed, "shots", "train"))
    own = np.flatnonzero(roles == VALIDATION)
    few = min(shots, MOST_VALIDATION_SHOTS)
    validation, _ = _draw(
        source, own if len(own) else rest, few, seed_for(seed, "shots", "validation")
    )
    roles[np.concatenate([pool, own])] = UNUSED
    roles[train], roles[validation] = OWN, VALIDATION
    _warn_of_short(source, pool, shots)
    return replace(source, roles=roles)


def _draw(source: ImageSource, rows: Indices, count: int, seed: int) -> tuple[Indices, Indices]:
    """At most `count` rows of each class, and the rest without the groups of those."""
    rng = np.random.default_rng(seed)
    mixed = rng.permutation(rows)  # all at once: the draw must not know the classes' order
    drawn: list[Indices] = []
    for label in np.unique(source.labels[rows]):
        shuffled = mixed[source.labels[mixed] == label]
        if source.groups is not None:  # group by group, in the order of their first images
            _, first, group = np.unique(
                source.groups[shuffled], return_index=True, return_inverse=True
            )
            shuffled = shuffled[np.argsort(first[group], kind="stable")]
        drawn.append(shuffled[:count])
    taken = np.sort(np.concatenate(drawn)) if drawn else rows[:0]
    kind = np.arange(len(source)) if source.groups is None else source.groups
    return taken, rows[~np.isin(kind[rows], kind[taken])]


def _warn_of_short(source: ImageSource, pool: Indices, shots: int) -> None:
    counts = np.bincount(source.labels[pool], minlength=len(source.class_names))
    short = [name for name, n in zip(source.class_names, counts, strict=True) if n < shots]
    if short:
        warnings.warn(
            f"data.shots: {len(short)} classes have fewer than {shots} training images, and keep "
            f"what they have: {some(short)}",
            FedclipWarning,
            stacklevel=3,
        )
