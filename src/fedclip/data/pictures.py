"""Images that Python code hands over: an array of many, or a list of PIL images and arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedclip.errors import UsageError, shortened
from fedclip.files import as_rgb

_SHAPES = "[n, height, width, 3] or [n, height, width]"


@dataclass(frozen=True)
class ListedImages:
    """Images in a list, of any sizes."""

    pictures: Sequence[Image.Image | NDArray[np.uint8]]
    name: str

    def content(self, index: int) -> bytes:
        """Size and levels of one picture as RGB."""
        try:
            picture = self.open(index)
        except Exception as error:  # Pillow opens lazily, and raises nearly anything
            raise ValueError(str(error)) from error
        return repr(picture.size).encode() + picture.tobytes()

    def open(self, index: int) -> Image.Image:
        """One picture, upright, as RGB."""
        return as_rgb(self.pictures[index])

    def path_of(self, index: int) -> str:
        """`given/17`."""
        return f"{self.name}/{index}"


def checked_array(images: Any, argument: str) -> NDArray[np.uint8]:
    """Images in one uint8 array; UsageError that says how to make one of anything else."""
    array = np.asarray(images)
    shown = f"got an array of shape {list(array.shape)} and type {array.dtype}"
    wanted = f"{argument} must be a uint8 array {_SHAPES}, or a list of images"
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] != 3) or 0 in array.shape:
        hint = ""
        if array.ndim == 4 and array.shape[1] == 3:
            hint = "; put the channels last: numpy.moveaxis(images, 1, -1)"
        elif array.ndim == 4 and 1 in (array.shape[1], array.shape[3]):
            hint = "; leave out the axis of length 1: images.squeeze()"
        raise UsageError(f"{wanted}, {shown}{hint}")
    _check_levels(array, wanted, shown)
    if array.ndim == 3 and array.shape[2] == 3:
        raise UsageError(
            f"{wanted}, {shown}, which may be one colour image or {len(array)} grey ones; put one "
            "image into a list: [image]"
        )
    return array


def checked_list(
    images: Sequence[Any], argument: str, first: int = 0
) -> list[Image.Image | NDArray[np.uint8]]:
    """PIL images and uint8 arrays, one each; UsageError for anything else, counted from `first`."""
    for number, image in enumerate(images, start=first):
        if isinstance(image, Image.Image):
            continue
        array = np.asarray(image)
        wanted = f"{argument}[{number}] must be a PIL image or a uint8 array"
        if array.dtype == object or array.dtype.kind in "US" or array.ndim == 0:
            raise UsageError(f"{wanted}, got {shortened(image)}")
        shown = f"got an array of shape {list(array.shape)} and type {array.dtype}"
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
            raise UsageError(f"{wanted} [height, width, 3] or [height, width], {shown}")
        _check_levels(array, wanted, shown)
    return [one if isinstance(one, Image.Image) else np.asarray(one) for one in images]


def _check_levels(array: NDArray[Any], wanted: str, shown: str) -> None:
    """Refuse levels that are no bytes: what 0.5 or 300 stands for only their owner knows."""
    if array.dtype == np.uint8:
        return
    hint = "levels from 0 to 255, then images.astype('uint8')"
    if array.dtype.kind == "f":
        hint = "of levels from 0 to 1: (images * 255).round().astype('uint8')"
    raise UsageError(f"{wanted}, {shown}; {hint}")
