"""Images to uint8 pixels, and pixels to what a vision tower expects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from fedclip.errors import UsageError
from fedclip.files import as_rgb

if TYPE_CHECKING:
    from transformers import CLIPImageProcessorPil

# What decides the uint8 pixels; rescaling and normalisation come later, on the device.
_GEOMETRY = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_convert_rgb")


class Pixels:
    """A model's image preprocessing, cut in two.

    Resizing and cropping happen once and give uint8; rescaling by `scale` and normalising by
    `mean` and `std` (three floats each) happen with every batch, where the model is.
    """

    def __init__(self, processor: CLIPImageProcessorPil, image_size: int) -> None:
        self._processor = processor
        self.image_size = image_size
        self.scale = float(processor.rescale_factor) if processor.do_rescale else 1.0
        self.mean = tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0)
        self.std = tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0)

    @property
    def key(self) -> str:
        """Names this preprocessing: two models with one key make the same uint8 pixels."""
        settings: dict[str, Any] = {name: getattr(self._processor, name) for name in _GEOMETRY}
        settings = {name: _plain(value) for name, value in settings.items()}
        settings["image_size"] = self.image_size
        text = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def facts(self) -> dict[str, Any]:
        """All that decides what the vision tower sees of an image, as JSON."""
        return {
            "pixels": self.key,
            "scale": self.scale,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def normalised(
        self, pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor
    ) -> torch.Tensor:
        """A tower's input, of uint8 `[n, 3, size, size]`; floats are taken to be that already."""
        if pixels.is_floating_point():
            return pixels
        return (pixels.float() * self.scale - mean) / std

    def to_pixels(self, images: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        """Resize and crop images to uint8 `[n, 3, size, size]`; each becomes RGB as its file would.

        See `fedclip.files.as_rgb` for what is taken; anything else raises `UsageError`.
        """
        size = self.image_size
        pixels = np.empty((len(images), 3, size, size), dtype=np.uint8)
        for row, image in enumerate(images):
            pixels[row] = np.asarray(self._fitted(_rgb(image, row))).transpose(2, 0, 1)
        return pixels

    def _fitted(self, image: Image.Image) -> Image.Image:
        """The square that a model sees of an RGB image, as its processor makes it.

        The processor itself checks its settings anew with every image, which for small ones takes
        ten times as long.
        """
        to: Any = self._processor.size
        resample = self._processor.resample
        width, height = image.size
        if (edge := to.shortest_edge) is None:
            wide, high = to.width, to.height
        elif width <= height:
            wide, high = edge, int(edge * height / width)
        else:
            wide, high = int(edge * width / height), edge
        resized = image.resize((wide, high), resample)
        left, top = (wide - self.image_size) // 2, (high - self.image_size) // 2
        return resized.crop((left, top, left + self.image_size, top + self.image_size))


def _rgb(image: Image.Image | np.ndarray, row: int) -> Image.Image:
    try:
        return as_rgb(image)
    # Pillow decodes lazily, and raises nearly anything on a damaged file.
    except Exception as error:
        raise UsageError(f"to_pixels: image {row} cannot be read: {error}") from error


def _plain(value: Any) -> Any:
    """Settings as JSON sees them: sizes as dictionaries, filters as numbers."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return {name: side for name, side in dict(value).items() if side is not None}
