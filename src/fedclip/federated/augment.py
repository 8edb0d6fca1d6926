"""Training images moved, turned and scaled a little: more from few examples."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import affine_grid, grid_sample

from fedclip.seeding import seed_for

MAX_ANGLE = math.radians(12)
MAX_SHIFT = 0.16  # of half a side: 2.5 pixels of 32
MAX_ZOOM = 1.15


def affine(pixels: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """The images `[batch, 3, size, size]`, each under an independent small affine map.

    Drawn from `seed` alone, evenly: a turn of up to 12 degrees, a shift of up to 8 % of a side
    along each axis, a zoom between 1 / 1.15 and 1.15. What comes in from outside repeats the edge.
    """
    rng = np.random.default_rng(seed)
    count = len(pixels)
    angle = rng.uniform(-MAX_ANGLE, MAX_ANGLE, count)
    zoom = np.exp(rng.uniform(-math.log(MAX_ZOOM), math.log(MAX_ZOOM), count))
    maps = np.zeros((count, 2, 3))
    maps[:, 0, 0] = maps[:, 1, 1] = np.cos(angle) * zoom
    maps[:, 1, 0] = np.sin(angle) * zoom
    maps[:, 0, 1] = -maps[:, 1, 0]
    maps[:, :, 2] = rng.uniform(-MAX_SHIFT, MAX_SHIFT, (count, 2))
    images = torch.from_numpy(pixels).float()
    grid = affine_grid(torch.from_numpy(maps).float(), list(images.shape), align_corners=False)
    moved = grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved.round().clamp(0, 255).to(torch.uint8).numpy()


def training_images(
    pixels: NDArray[np.uint8], augment: str, seed: int, step: int, part: int | str
) -> NDArray[np.uint8]:
    """Return the micro-batch, augmented with a separate seed if augmentation is on."""
    return pixels if augment == "none" else affine(pixels, seed_for(seed, "augment", step, part))
