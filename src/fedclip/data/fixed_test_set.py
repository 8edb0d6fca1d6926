"""A test set that is the same for runs of several seeds (`data.test_seed`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from fedclip.config import DataConfig
from fedclip.data.captions import same_pictures
from fedclip.data.roles import FIXED_TEST, OWN, TEST, roles_of
from fedclip.data.source import ImageSource
from fedclip.data.splits import Indices, split
from fedclip.seeding import seed_for


def with_fixed_test(source: ImageSource, by_site: bool, data: DataConfig) -> ImageSource:
    """The same data set, of whose training pool `data.test_fraction` is set apart for tests.

    Drawn from the whole pool, site by site where sites are the clients, before anything that
    depends on the run's own seed. So no seed trains or validates on another one's test images.
    Whoever is given such an image later tests on it.
    """
    if data.test_seed is None or data.test_fraction == 0:
        return source
    roles = roles_of(source).copy()
    pool = np.flatnonzero(roles == OWN)
    sites = source.sites if by_site else None
    if sites is not None and (sites[roles == TEST] >= 0).any():
        return source  # every site has its part of the data set's own test split
    digests = source.digests(pool)
    identities: list[bytes] = [b""] * len(source)
    for row, digest in zip(pool.tolist(), digests, strict=True):
        identities[row] = digest
    groups: Indices | None = source.groups
    if source.captioned and (same := same_pictures(digests)) is not None:
        groups = np.zeros_like(roles)
        groups[pool] = same
    strata = np.zeros_like(roles) if source.captioned else source.labels
    for name, rows in _areas(source, pool, by_site):
        _, _, test = split(
            rows,
            strata,
            groups,
            validation_fraction=0.0,
            test_fraction=data.test_fraction,
            seed=seed_for(data.test_seed, "test", name),
            identities=identities,
        )
        roles[test] = FIXED_TEST
    return replace(source, roles=roles)


def _areas(source: ImageSource, pool: Indices, by_site: bool) -> Iterator[tuple[str, Indices]]:
    """The parts of the pool that are drawn from one by one, with their names."""
    if not by_site or source.sites is None:
        yield "", pool
        return
    own = source.sites[pool]
    for site in np.unique(own[own >= 0]).tolist():
        yield source.site_names[site], pool[own == site]
