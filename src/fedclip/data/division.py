"""Examples to clients: who belongs to which site, and what each client keeps for which purpose."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedclip.config import DataConfig
from fedclip.data.captions import same_pictures
from fedclip.data.partition import partition
from fedclip.data.roles import FIXED_TEST, HELD_OUT, OWN, TEST, UNUSED, VALIDATION, roles_of
from fedclip.data.source import ImageSource, Labels, Mask
from fedclip.data.splits import ClientData, Indices, cap, split
from fedclip.errors import FedclipWarning, UsageError
from fedclip.seeding import seed_for


@dataclass(frozen=True)
class Examples:
    """What is known of the decoded images, row by row; `usable` says which may be used."""

    labels: Labels
    role: Labels  # as in `data.roles`
    usable: Mask
    sites: Labels | None
    groups: Labels | None
    class_names: tuple[str, ...]
    site_names: tuple[str, ...]
    digests: Sequence[bytes]  # of the images' files
    captioned: bool = False

    @classmethod
    def of(
        cls, source: ImageSource, used: Indices, digests: Sequence[bytes], bad: Sequence[int]
    ) -> Examples:
        """The rows `used` of a source, of which those at the places `bad` are unusable.

        Where there are captions, copies of one picture are one group.
        """
        usable = np.ones(len(used), dtype=bool)
        usable[list(bad)] = False
        groups = None if source.groups is None else source.groups[used]
        if source.captioned:
            groups = same_pictures(digests)
        return cls(
            labels=source.labels[used],
            role=roles_of(source)[used],
            usable=usable,
            sites=None if source.sites is None else source.sites[used],
            groups=groups,
            class_names=source.class_names,
            site_names=source.site_names,
            digests=digests,
            captioned=source.captioned,
        )

    @property
    def strata(self) -> Labels:
        """What a division keeps in proportion: classes, or nothing where there are captions."""
        return np.zeros_like(self.labels) if self.captioned else self.labels

    def having(self, role: int) -> Indices:
        """Usable rows of one role."""
        return np.flatnonzero(self.usable & (self.role == role))

    def central(self, part: str, clients: Sequence[ClientData]) -> Indices:
        """The central `test` or `validation` set: the predefined split, else the clients' union.

        Held-out sites are the test set where there are any. A fixed one is whole, though a
        partition may leave out an image.
        """
        own = self.having(TEST if part == "test" else VALIDATION)
        if part == "test" and len(self.having(HELD_OUT)):
            own = self.having(HELD_OUT)
        if part == "test" and not len(own):
            own = self.having(FIXED_TEST)
        if len(own):
            return own
        return np.sort(np.concatenate([getattr(client, part) for client in clients]))


def choose(source: ImageSource, by_site: bool, data: DataConfig, seed: int) -> Indices:
    """Rows of a source that a run uses: the capped training pool and the predefined splits.

    The pool is so large that `max_train_examples` are left when the clients have held out their
    validation and test examples.
    """
    roles = roles_of(source)
    max_examples = data.max_train_examples
    pool = np.flatnonzero(roles == OWN)
    if not len(pool):
        raise UsageError(f"data: {source.name} has no training images, only test or validation")
    sites = source.sites[pool] if by_site and source.sites is not None else None
    if sites is not None and max_examples is not None and max_examples < len(np.unique(sites)):
        raise UsageError(
            f"data.max_train_examples: {max_examples} examples cannot give each of "
            f"{len(np.unique(sites))} sites one; raise it, or choose another data.partition.name"
        )
    if max_examples is not None:
        max_examples = round(max_examples / _train_share(source, by_site, data))
    strata = np.zeros_like(pool) if source.captioned else source.labels[pool]
    kept = cap(strata, sites, max_examples, seed_for(seed, "max_train_examples"))
    others = np.flatnonzero((roles != OWN) & (roles != UNUSED))
    return np.sort(np.concatenate([pool[kept], others]))


def _train_share(source: ImageSource, by_site: bool, data: DataConfig) -> float:
    """What clients keep for training of their part of the pool, but for fixed tests."""
    fixed = (roles_of(source) == FIXED_TEST).any()
    held = (
        {TEST: 0.0, VALIDATION: _of_the_rest(data)}
        if fixed
        else {TEST: data.test_fraction, VALIDATION: data.validation_fraction}
    )
    for role in held:
        rows = roles_of(source) == role
        if by_site and source.sites is not None and (source.sites[rows] >= 0).any():
            held[role] = 0.0  # the sites' clients have a part of the data set's own split
    return 1.0 - sum(held.values())


def _of_the_rest(data: DataConfig) -> float:
    """The share for validation of what is left when fixed tests are set apart."""
    return data.validation_fraction / (1 - data.test_fraction)


def divide(
    examples: Examples, data: DataConfig, name: str, num_clients: int, seed: int
) -> tuple[ClientData, ...]:
    """The clients, in the order of sites or numbers, each with its three parts."""
    pool = np.sort(np.concatenate([examples.having(OWN), examples.having(FIXED_TEST)]))
    scheme = data.partition
    parts = partition(
        examples.strata[pool],
        name,
        num_clients,
        seed,
        sites=None if examples.sites is None else examples.sites[pool],
        groups=None if examples.groups is None else examples.groups[pool],
        alpha=scheme.alpha,
        min_size=scheme.min_size,
        classes_per_client=scheme.classes_per_client,
        shards_per_client=scheme.shards_per_client,
        size_skew=scheme.size_skew,
    )
    width = max(2, len(str(len(parts) - 1)))
    clients = []
    for number, part in enumerate(parts):
        site = None
        client_id = f"client-{number:0{width}}"
        if name == "natural" and examples.sites is not None:
            site = int(examples.sites[pool[part[0]]])
            client_id = examples.site_names[site]
        clients.append(_client(client_id, pool[part], site, examples, data, seed))
    if not examples.captioned:
        _warn_of_gaps(examples, clients, natural=name == "natural")
    return tuple(clients)


def _client(
    client_id: str,
    indices: Indices,
    site: int | None,
    examples: Examples,
    data: DataConfig,
    seed: int,
) -> ClientData:
    """Split one client's data; predefined splits of its site take precedence."""
    own_test = _of_site(examples, site, TEST)
    own_validation = _of_site(examples, site, VALIDATION)
    test_fraction, validation_fraction = data.test_fraction, data.validation_fraction
    if (examples.role == FIXED_TEST).any():
        fixed = examples.role[indices] == FIXED_TEST
        own_test, indices = indices[fixed], indices[~fixed]
        validation_fraction = _of_the_rest(data)
        _require_training(client_id, indices)
    train, validation, test = split(
        indices,
        examples.strata,
        examples.groups,
        validation_fraction=validation_fraction if own_validation is None else 0.0,
        test_fraction=test_fraction if own_test is None else 0.0,
        seed=seed_for(seed, "split", client_id),
        identities=examples.digests,
    )
    return ClientData(
        client_id=client_id,
        train=train,
        validation=validation if own_validation is None else own_validation,
        test=test if own_test is None else own_test,
    )


def _require_training(client_id: str, indices: Indices) -> None:
    if not len(indices):
        raise UsageError(
            f"data.test_seed: all images of {client_id} are in the fixed test set; raise "
            "data.partition.min_size, lower federation.num_clients, or choose another test_seed"
        )


def _of_site(examples: Examples, site: int | None, role: int) -> Indices | None:
    """A site's part of a predefined split; None where that split is not divided by site."""
    rows = examples.having(role)
    if site is None or examples.sites is None or not (examples.sites[rows] >= 0).any():
        return None
    return rows[examples.sites[rows] == site]


def without_empty_sites(examples: Examples, on_empty_site: str) -> Examples:
    """Leave out sites without a training image, or refuse them by name."""
    if examples.sites is None:
        return examples
    pool = examples.having(OWN)
    filled = set(examples.sites[pool].tolist())
    homeless = int((examples.sites[pool] < 0).sum())
    if homeless:
        _warn(f"data: {homeless} training images belong to no site and are left out")
    others = set(examples.sites[examples.having(HELD_OUT)].tolist())
    empty = [i for i in range(len(examples.site_names)) if i not in filled | others]
    named = ", ".join(_describe_empty(examples, i) for i in empty[:5])
    named += f" and {len(empty) - 5} more" if len(empty) > 5 else ""
    if empty and (on_empty_site == "error" or not filled - {-1}):
        raise UsageError(
            f"data: sites without a usable training image: {named}; add images, remove their "
            "folders, or leave them out with data.on_empty_site: skip"
        )
    if empty:
        _warn(f"sites without a usable training image are left out: {named}")
    gone = (examples.role == OWN) & (examples.sites < 0) | np.isin(examples.sites, empty)
    return replace(examples, usable=examples.usable & ~gone)


def _describe_empty(examples: Examples, site: int) -> str:
    assert examples.sites is not None
    unreadable = int(((examples.sites == site) & ~examples.usable & (examples.role == OWN)).sum())
    more = f" ({unreadable} images, none readable)" if unreadable else ""
    return f"{examples.site_names[site]}{more}"


def _warn_of_gaps(examples: Examples, clients: Sequence[ClientData], natural: bool) -> None:
    """Say what cannot be learned well: sites of one class, classes that nobody trains on."""
    names = examples.class_names
    if natural and len(names) > 1:
        single = [c for c in clients if len(np.unique(examples.labels[c.train])) == 1]
        for client in single:
            only = names[int(examples.labels[client.train[0]])]
            _warn(f"site {client.client_id} has images of one class only: {only}")
    trained = np.concatenate([client.train for client in clients])
    counts = np.bincount(examples.labels[trained], minlength=len(names))
    missing = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if missing:
        listed = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        _warn(f"{len(missing)} of {len(names)} classes have no training image: {listed}")


def _warn(message: str) -> None:
    warnings.warn(message, FedclipWarning, stacklevel=4)
