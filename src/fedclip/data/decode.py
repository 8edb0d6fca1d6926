"""Decode and resize once: images to uint8 pixels, in memory or in a memory-mapped cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedclip.data.cache import PixelCache
from fedclip.data.source import ImageSource
from fedclip.errors import UsageError

Pixels = NDArray[np.uint8]
ToPixels = Callable[[Sequence[Any]], Pixels]
Progress = Callable[[int, int], None]

CHUNK_IMAGES = 256
# Photos are large before they are resized: a chunk also ends at this many pixels (48 MB).
CHUNK_PIXELS = 16_000_000


@dataclass(frozen=True)
class BadImage:
    """An image that could not be read: its place among the decoded ones, its path, the reason."""

    position: int
    path: str
    reason: str

    def __str__(self) -> str:
        """`cats/7.png (cannot identify image file)`."""
        return f"{self.path} ({self.reason})"


def decode(
    source: ImageSource,
    indices: NDArray[np.int64],
    to_pixels: ToPixels,
    pixels_key: str,
    *,
    memory_gb: float = 4.0,
    on_bad_image: str = "skip",
    content_key: str | None = None,
    progress: Progress | None = None,
) -> tuple[Pixels, list[BadImage]]:
    """Pixels `[len(indices), 3, size, size]` uint8, and the images that could not be read.

    A bad image keeps its place, as zeros. Beyond `memory_gb` (10^9 bytes) the pixels are a
    read-only memory map of a cache file, named by `content_key` (the source's fingerprint of
    these images) and `pixels_key` (the model's preprocessing), and later runs decode nothing.
    """
    shape = (len(indices), *to_pixels([Image.new("RGB", (8, 8))]).shape[1:])

    def chunks() -> Iterator[tuple[Pixels, list[tuple[int, str]]]]:
        return _decode_chunks(source, indices, to_pixels, shape[1:], progress)

    found: list[tuple[int, str]] = []
    if int(np.prod(shape)) <= memory_gb * 1e9:
        pixels = np.empty(shape, dtype=np.uint8)
        start = 0
        for rows, bad in chunks():
            pixels[start : start + len(rows)] = rows
            start += len(rows)
            found += bad
    else:
        key = content_key or source.fingerprint(indices)
        pixels, found = PixelCache(key, pixels_key).load_or_make(shape, chunks)
    bad_images = [BadImage(at, source.images.path_of(int(indices[at])), why) for at, why in found]
    if bad_images and on_bad_image == "error":
        raise UsageError(
            f"{describe_bad(bad_images, len(indices))}; mend or remove them, "
            "or leave them out with data.on_bad_image: skip"
        )
    return pixels, bad_images


def describe_bad(bad_images: Sequence[BadImage], total: int) -> str:
    """How many images could not be read, and the first few by path."""
    named = "; ".join(str(bad) for bad in bad_images[:3])
    more = f"; and {len(bad_images) - 3} more" if len(bad_images) > 3 else ""
    return f"{len(bad_images)} of {total} images cannot be read: {named}{more}"


def _decode_chunks(
    source: ImageSource,
    indices: NDArray[np.int64],
    to_pixels: ToPixels,
    shape: tuple[int, ...],
    progress: Progress | None,
) -> Iterator[tuple[Pixels, list[tuple[int, str]]]]:
    """Rows in order with the bad ones among them, as (place, reason), chunk by chunk."""
    start = 0
    while start < len(indices):
        images: list[Image.Image] = []
        good: list[int] = []
        bad: list[tuple[int, str]] = []
        size = 0
        stop = start
        while stop < len(indices) and stop - start < CHUNK_IMAGES and size < CHUNK_PIXELS:
            image = _open(source, int(indices[stop]))
            if isinstance(image, str):
                bad.append((stop, image))
            else:
                images.append(image)
                good.append(stop - start)
                size += image.width * image.height
            stop += 1
        rows = np.zeros((stop - start, *shape), dtype=np.uint8)
        if images:
            rows[good] = to_pixels(images)
        yield rows, bad
        start = stop
        if progress is not None:
            progress(stop, len(indices))


def _open(source: ImageSource, index: int) -> Image.Image | str:
    """The image, or in one line why there is none."""
    try:
        with warnings.catch_warnings():
            # Decoders warn of odd metadata; past twice its limit Pillow refuses a bomb by error.
            warnings.simplefilter("ignore")
            return source.images.open(index)
    except Exception as error:  # decoders raise nearly anything on a damaged file
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        return (str(error) or type(error).__name__).split("\n")[0].split(" '/")[0].split(" <")[0]
