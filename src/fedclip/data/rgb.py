"""Any image file to upright 8-bit RGB."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from fedclip.data.picture_types import readable_formats
from fedclip.files import MAX_ASPECT_RATIO, open_regular, to_rgb, upright

LARGE = 12_000_000
"""Pixels from which a picture is made smaller while it is decoded: a fraction of the memory."""
SHORT_EDGE = 672
"""What is left of the short edge then, at least: twice the input of the largest CLIP."""
_ORIENTATION = 0x0112
_FULL_SIZE = "full_size"


def open_rgb(file: Path | BinaryIO, *, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Decode one file: rotation from EXIF applied, alpha over white, any mode to RGB.

    `formats` are Pillow's names of those that are accepted; None accepts all that are read at all.
    Pictures of more than LARGE pixels come out smaller, by a whole factor.
    """
    with (
        open_regular(file) if isinstance(file, Path) else nullcontext(file) as stream,
        _identified(stream, formats or readable_formats()) as image,
    ):
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels: too narrow for a picture")
        size, factor = image.size, _factor(image.size)
        if factor > 1:  # JPEG is decoded at a half, a fourth or an eighth, for less than the whole
            image.draft(image.mode, (image.width // factor, image.height // factor))
            factor = _factor(image.size)
        image.load()
        made = to_rgb(upright(image)) if factor == 1 else upright(_reduced(image, factor))
        made.info[_FULL_SIZE] = size
        return made


def _identified(stream: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    try:
        return Image.open(stream, formats=formats)
    except UnidentifiedImageError:  # Pillow's text names an object in memory
        raise UnidentifiedImageError("cannot identify image file") from None


def full_size(image: Image.Image) -> tuple[int, int]:
    """Width and height that a picture of `open_rgb` has in its file."""
    return image.info.get(_FULL_SIZE, image.size)


def _factor(size: tuple[int, int]) -> int:
    """By how much a picture of this size is made smaller."""
    return max(1, min(size) // SHORT_EDGE) if size[0] * size[1] > LARGE else 1


def _reduced(image: Image.Image, factor: int) -> Image.Image:
    """A picture as RGB, made smaller strip by strip, so that few copies of it are in memory."""
    width, height = image.size
    wide = image.mode.startswith(("I", "F"))
    high = float(np.max(np.nan_to_num(image.getextrema()))) if wide else None
    canvas = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    with suppress(Exception):  # damaged metadata says nothing about the picture
        canvas.getexif()[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
    rows = factor * max(1, 1_000_000 // (width * factor))
    for top in range(0, height, rows):
        strip = to_rgb(image.crop((0, top, width, min(top + rows, height))), high)
        canvas.paste(strip.reduce(factor), (0, top // factor))
    return canvas
