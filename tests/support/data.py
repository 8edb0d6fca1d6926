"""What the tests of the data room share."""

from __future__ import annotations

import numpy as np

from fedclip.config import DataConfig
from fedclip.data.federated_data import FederatedData
from fedclip.data.loading import load_federated
from fedclip.data.source import FileImages, ImageSource

SIZE = 8


def to_pixels(images) -> np.ndarray:
    """What a model's preprocessing does: resize, uint8, channels first."""
    rows = [np.asarray(image.resize((SIZE, SIZE))).transpose(2, 0, 1) for image in images]
    return np.stack(rows)


def source_of(images) -> ImageSource:
    """A data set of one class that holds these images."""
    n = len(images.paths) if isinstance(images, FileImages) else len(images.array)
    return ImageSource("test", images, np.zeros(n, dtype=np.int64), ("only",), ("{}",))


def load(
    num_clients: int = 10, seed: int = 0, partition: dict | None = None, **data
) -> FederatedData:
    """A federation's data by keys of the `data` section."""
    config = DataConfig(**data, partition=partition or {})
    return load_federated(config, num_clients, seed, to_pixels, "key")


def everything(client) -> np.ndarray:
    """All of a client's examples."""
    return np.concatenate([client.train, client.validation, client.test])


def all_unique(*parts) -> bool:
    """Whether no example stands twice in the parts."""
    joined = np.concatenate(parts)
    return len(np.unique(joined)) == len(joined)
