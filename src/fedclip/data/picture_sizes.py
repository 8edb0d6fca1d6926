"""How large a data set's images are, and how much a model's input shrinks them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image

from fedclip.data.federated_data import FederatedData
from fedclip.data.picture_types import readable_formats
from fedclip.data.rgb import full_size
from fedclip.data.source import ImageStore, Labels
from fedclip.errors import FedclipWarning

SAMPLE = 256
"""Images whose sizes are looked at, evenly spaced among all."""
MUCH = 4.0
"""How much smaller images may become before a run says so."""

Size = tuple[int, int]


def median_size(images: ImageStore, indices: Labels) -> Size | None:
    """Width and height of the image with the median shorter side; None without images.

    Headers are read, not pixels, so that it costs little and is the same with and without a cache.
    """
    count = min(SAMPLE, len(indices))
    places = np.linspace(0, len(indices) - 1, count).round().astype(np.int64)
    known = [size for place in places if (size := _size(images, int(indices[place])))]
    return _median(known)


def warn_if_shrunk(data: FederatedData, input_size: int, advice: str) -> None:
    """Say that images lose much in an input of so many pixels a side."""
    size, factor = data.median_size, shrunk(data.median_size, input_size)
    if size is None or factor is None or factor <= MUCH:
        return
    warnings.warn(
        f"data: images of {data.name} shrink {factor:.2g}-fold, from {size[0]} x {size[1]} pixels "
        f"(the median) to the model's {input_size} x {input_size}; details below some "
        f"{2 * factor:.0f} pixels may be lost. {advice}",
        FedclipWarning,
        stacklevel=3,
    )


def shrunk(size: Size | None, input_size: int) -> float | None:
    """How many times smaller the shorter side becomes; below 1 it becomes larger."""
    return None if size is None else min(size) / input_size


def _median(sizes: Sequence[Size]) -> Size | None:
    return sorted(sizes, key=min)[(len(sizes) - 1) // 2] if sizes else None


def _size(images: ImageStore, index: int) -> Size | None:
    """Width and height of one image, by its header where it has one; None where it is damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        try:
            with Image.open(BytesIO(images.content(index)), formats=readable_formats()) as image:
                return image.size
        except Exception:  # decoders raise nearly anything; arrays have no header
            pass
        try:
            return full_size(images.open(index))
        except Exception:  # it has been named as damaged
            return None
