"""Load a federation's data: decode once, divide over clients, split for training and testing."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

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
from fedclip.data.fixed_test_set import with_fixed_test
from fedclip.data.partition import partition_seed, require_sites
from fedclip.data.picture_sizes import median_size
from fedclip.data.roles import with_shots, with_test_sites
from fedclip.data.source import ImageSource, fingerprint_of
from fedclip.errors import FedclipWarning, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray


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

    `data.max_train_examples` caps the pool that is divided, before anything is decoded, at what
    leaves about that many to train on. The central test set is that of the data set, else the
    union of the clients'; a client's test set is its site's part of the former where that has
    sites, else `data.test_fraction` of its examples. Validation goes the same way. `to_pixels` and
    `pixels_key` are the model's preprocessing; `read_captions` says what the text tower reads of
    `captions`. A `source` takes the place of the one that the configuration names. Data that leave
    nothing to test on are refused, unless that is not needed.
    """
    source, name, data = _source(data, captions, seed, source, read_captions)
    source = with_fixed_test(source, name == "natural", data)
    used = choose(source, name == "natural", data, seed)
    digests = source.digests(used)
    fingerprint = fingerprint_of(digests)
    pixels, bad = _decoded(source, used, data, fingerprint, to_pixels, pixels_key, progress)
    examples = Examples.of(source, used, digests, bad=[image.position for image in bad])
    if name == "natural":
        examples = without_empty_sites(examples, data.on_empty_site)
    clients = divide(examples, data, name, num_clients, seed)
    pictures = same_pictures(digests) if captions else None
    if captions:
        clients = with_two_pairs(clients, pictures)
    federation = FederatedData(
        name=source.name,
        pixels=pixels,
        labels=examples.labels,
        class_names=source.class_names,
        templates=source.templates,
        clients=clients,
        validation=examples.central("validation", clients),
        test=examples.central("test", clients),
        bad_images=tuple(str(image) for image in bad),
        fingerprint=fingerprint,
        partition=_scheme(data, name, seed),
        captioned=captions,
        pictures=pictures,
        places=source.places(used),
        median_size=median_size(source.images, np.delete(used, [b.position for b in bad])),
        test_seed=data.test_seed,
    )
    if needs_tests:
        _require_tests(federation.test, data)
    if data.train_classes is not None:
        federation = with_base_classes(federation, data.train_classes)
    warn_of_one_class(federation)
    return federation


def _decoded(
    source: ImageSource,
    used: NDArray[np.int64],
    data: DataConfig,
    fingerprint: str,
    to_pixels: ToPixels,
    pixels_key: str,
    progress: Progress | None,
) -> tuple[NDArray[np.uint8], list[BadImage]]:
    """The pixels of the images that are used, and the images that could not be read."""
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
    return pixels, bad


def _leave_something(data: DataConfig) -> None:
    """Refuse fractions that hold everything out."""
    if data.validation_fraction + data.test_fraction >= 1:
        raise UsageError(
            "data.validation_fraction and data.test_fraction must leave something to train on, "
            f"got {data.validation_fraction} and {data.test_fraction}"
        )


def _require_tests(test: NDArray[np.int64], data: DataConfig) -> None:
    """Refuse data that leave nothing to test on."""
    if not len(test):
        raise UsageError(
            "data.test_fraction: the data set has no test split and no client is large enough to "
            f"hold out a test example (fraction {data.test_fraction}); raise it, lower "
            "federation.num_clients, or use more data"
        )


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
) -> tuple[ImageSource, str, DataConfig]:
    """The data set with each image's role, its partition's name, and what is left to hold out."""
    _leave_something(data)
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
        # What is held out is chosen already, for all clients together.
        data = data.model_copy(update={"validation_fraction": 0.0, "test_fraction": 0.0})
    return source, name, data


def _report(bad: list[BadImage], total: int) -> None:
    """Say which images are left out; nothing can go on without any."""
    if not bad:
        return
    if len(bad) == total:
        raise UsageError(f"data: no image is left: {describe_bad(bad, total)}")
    warnings.warn(f"{describe_bad(bad, total)}; left out", FedclipWarning, stacklevel=3)


def _scheme(data: DataConfig, name: str, seed: int) -> dict[str, Any]:
    """The partitioner, with its seed and the settings of `data.partition` that it reads."""
    scheme: dict[str, Any] = {"name": name, "seed": partition_seed(seed)}
    return scheme | {key: getattr(data.partition, key) for key in _READS.get(name, ())}


_READS = {
    "dirichlet": ("alpha", "min_size"),
    "pathological": ("classes_per_client",),
    "shard": ("shards_per_client",),
    "size": ("size_skew",),
}
