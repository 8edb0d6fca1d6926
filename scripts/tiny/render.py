"""Rendering: icons to square RGBA arrays, by the same resvg call for training and for the data."""

from __future__ import annotations

import io
from collections.abc import Iterable
from multiprocessing import Pool

import numpy as np
import resvg_py
from PIL import Image
from scipy import ndimage

SIZE = 48


def rgba(svg: str, size: int) -> np.ndarray | None:
    """An SVG as uint8 [size, size, 4], centred and not stretched, or None where resvg fails."""
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
        image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    except Exception:
        return None
    if image.size != (size, size):
        canvas = Image.new("RGBA", (size, size))
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = canvas
    return np.asarray(image)


def dark_on_white(svg: str, size: int = 32) -> np.ndarray | None:
    """An SVG as uint8 grey [size, size], as a page shows it: dark on white."""
    picture = rgba(svg, size)
    if picture is None:
        return None
    alpha = picture[..., 3:].astype(np.float32) / 255
    flat = picture[..., :3] * alpha + 255 * (1 - alpha)
    return np.round(flat.mean(-1)).astype(np.uint8)


def interior(alpha: np.ndarray) -> np.ndarray:
    """What an outline encloses, as a mask: training shades it, so that outlines look solid too."""
    ink = alpha > 60
    return (ndimage.binary_fill_holes(ink) & ~ink).astype(np.uint8) * 255


def _job(item: tuple[str, int]) -> np.ndarray | None:
    picture = rgba(*item)
    if picture is None or picture[..., 3].max() < 64:
        return None
    return picture


def render_many(svgs: list[str], size: int = SIZE, workers: int = 2) -> Iterable:
    """Renderings in the order of `svgs`, None for those that fail or are empty."""
    with Pool(workers) as pool:
        yield from pool.imap(_job, ((s, size) for s in svgs), chunksize=64)
