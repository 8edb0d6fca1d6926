"""Load a federation's data: decode once, divide over clients, split for training and testing."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from fedclip.config import DataConfig
from fedclip.data.base_classes import with_base_classes
from fedclip.data.captions import (
    Reader,
    require_classes,
    require_no_classes,
    same_pictures,
    with_captions,
    with_two_pairs,
)
from fedclip.data.datasets import load_source
from fedclip.data.decode import BadImage, Progress, ToPixels, decode, describe_bad
from fedclip.data.division import Examples, choose, divide, without_empty_sites
from fedclip.data.federated_data import FederatedData
from fedclip.data.fixed_test import with_fixed_test
from fedclip.data.partition import partition_seed, require_sites
from fedclip.data.picture_sizes import median_size
from fedclip.data.roles import with_shots, with_test_sites
from fedclip.data.source import ImageSource, fingerprint_of
from fedclip.errors import FedclipWarning, UsageError


def load_federated(
    data: DataConfig,
    num_clients: int,
    seed: int,
    to_pixels: ToPixels,
    pixels_key: str,
    progress: Progress | None = None,
    captions: bool = False,
    source: ImageSource | None = None,
    read_captions: Reader | None = None,
    needs_tests: bool = True,
) -> FederatedData:
    """Load, decode, divide and split a data set as its configuration says.

    With `captions` images go with captions in the place of classes.
    `data.max_train_examples` caps the pool that is divided, before anything is decoded, at what
    leaves about that many to train on when the clients have held out theirs. The
    central test set is the data set's own, else the union of the clients'; a client's test set is
    its site's part of the own one where that has sites, else `data.test_fraction` of its examples.
    Validation goes the same way. `to_pixels` and `pixels_key` are the model's preprocessing.
    A `source` takes the place of the data set that the configuration names; `read_captions` says
    what the text tower reads of captions. Data that leave nothing to test on are refused, unless
    that is not needed.
    """
    if data.validation_fraction + data.test_fraction >= 1:
        raise UsageError(
            "data.validation_fraction and data.test_fraction must leave something to train on, "
            f"got {data.validation_fraction} and {data.test_fraction}"
        )
    source, name = _source(data, captions, seed, source, read_captions)
    if data.shots is not None:  # what is held out is chosen already, for all clients together
        data = data.model_copy(update={"validation_fraction": 0.0, "test_fraction": 0.0})
    source = with_fixed_test(source, name == "natural", data)
    used = choose(source, name == "natural", data, seed)
    digests = source.digests(used)
    fingerprint = fingerprint_of(digests)
    pixels, bad = decode(
        source,
        used,
        to_pixels,
        pixels_key,
        memory_gb=data.memory_gb,
        on_bad_image=data.on_bad_image,
        content_key=fingerprint,
        progress=progress,
    )
    _report(bad, len(used))
    examples = Examples.of(source, used, digests, bad=[image.position for image in bad])
    if name == "natural":
        examples = without_empty_sites(examples, data.on_empty_site)
    scheme = {"name": name, "seed": partition_seed(seed)} | _options(data, name)
    clients = divide(examples, data, name, num_clients, seed)
    pictures = same_pictures(digests) if captions else None
    if captions:
        clients = with_two_pairs(clients, pictures)
    validation = examples.central("validation", clients)
    test = examples.central("test", clients)
    if needs_tests and not len(test):
        raise UsageError(
            "data.test_fraction: the data set has no test split and no client is large enough to "
            f"hold out a test example (fraction {data.test_fraction}); raise it, lower "
            "federation.num_clients, or use more data"
        )
    federation = FederatedData(
        name=source.name,
        pixels=pixels,
        labels=examples.labels,
        class_names=source.class_names,
        templates=source.templates,
        clients=clients,
        validation=validation,
        test=test,
        bad_images=tuple(str(image) for image in bad),
        fingerprint=fingerprint,
        partition=scheme,
        captioned=captions,
        pictures=pictures,
        places=source.places(used),
        median_size=median_size(source.images, np.delete(used, [b.position for b in bad])),
        test_seed=data.test_seed,
    )
    if data.train_classes is not None:
        federation = with_base_classes(federation, data.train_classes)
    warn_of_one_class(federation)
    return federation


def warn_of_one_class(data: FederatedData) -> None:
    """Say that a single class makes every answer right."""
    if len(data.class_names) == 1 and not data.captioned:
        warnings.warn(
            f"data: there is a single class, {data.class_names[0]}, so every answer is right and "
            "no accuracy means anything; add images of other classes",
            FedclipWarning,
            stacklevel=3,
        )


def _source(
    data: DataConfig,
    captions: bool,
    seed: int,
    given: ImageSource | None,
    read_captions: Reader | None,
) -> tuple[ImageSource, str]:
    """The data set, with what each image is for, and the name of its partition."""
    source = given or load_source(
        data.name,
        path=data.path,
        layout=data.layout,
        class_names=data.class_names,
        templates=data.templates,
    )
    name = data.partition.name
    if name == "auto":
        name = "iid" if source.captioned else "dirichlet"
        name = name if source.sites is None else "natural"
    if name == "natural":
        require_sites(source.sites)  # before anything is decoded
    if captions:
        require_no_classes(source, name, data.shots)
        source = with_captions(source, read_captions)
    else:
        require_classes(source)
    if data.test_sites is not None:
        source = with_test_sites(source, data.test_sites)
    if data.shots is not None:
        source = with_shots(source, data.shots, data.test_fraction, seed, data.test_seed)
    return source, name


def _report(bad: list[BadImage], total: int) -> None:
    """Say which images are left out; nothing can go on without any."""
    if not bad:
        return
    if len(bad) == total:
        raise UsageError(f"data: no image is left: {describe_bad(bad, total)}")
    warnings.warn(f"{describe_bad(bad, total)}; left out", FedclipWarning, stacklevel=3)


def _options(data: DataConfig, name: str) -> dict[str, Any]:
    """The settings of `data.partition` that the named partitioner reads."""
    return {key: getattr(data.partition, key) for key in _READS.get(name, ())}


_READS = {
    "dirichlet": ("alpha", "min_size"),
    "pathological": ("classes_per_client",),
    "shard": ("shards_per_client",),
    "size": ("size_skew",),
}
