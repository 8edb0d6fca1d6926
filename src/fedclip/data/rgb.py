"""Any image file to upright 8-bit RGB."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

# Resizing the short edge to the model's size would blow such a picture up beyond all memory.
MAX_ASPECT_RATIO = 200


def open_rgb(file: Path | BinaryIO, *, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Decode one file: rotation from EXIF applied, alpha over white, any mode to RGB.

    `formats` are Pillow's names of those that are accepted; None accepts all that it knows.
    """
    with Image.open(file, formats=formats) as image:
        image.load()
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels: too narrow for a picture")
        return to_rgb(_upright(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB.

    Transparency is laid over white. 16-bit grey levels are divided by 257, whatever the image
    holds. Modes I and F do not say how far their levels go: `_to_8_bit` takes the first of 1
    (floats only), 255 and 65535 that the largest level does not exceed. So no image is stretched
    to its own extremes, but one that stays below 256 is brighter than its 16-bit neighbours.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        if image.mode in ("RGBa", "La"):  # premultiplied: Pillow converts each one way only
            image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, "white")
        canvas.alpha_composite(layer)
        return canvas.convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata says nothing about the picture
        return image


def _to_8_bit(levels: np.ndarray) -> np.ndarray:
    """Wide grey levels to uint8, by one of the factors 255 (floats only), 1 and 1/257."""
    values = np.nan_to_num(levels.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    high = values.max(initial=0.0)
    if np.issubdtype(levels.dtype, np.floating):
        scale = 255.0 if high <= 1.0 else 1.0 if high <= 255.0 else 1 / 257
    else:  # mode "I" also carries 8-bit files; "I;16" arrives as uint16
        scale = 1 / 257 if levels.dtype.itemsize == 2 or high > 255 else 1.0
    return np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
