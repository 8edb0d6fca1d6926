"""Augmentation, a batch at a time: colour, polarity, stroke, affine, blur, low resolution."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .model import IMAGE_SIZE


def _some(n: int, share: float, g: torch.Generator) -> Tensor:
    """Indices of a random share of n rows."""
    return (torch.rand(n, generator=g) < share).nonzero()[:, 0]


def _between(n: int, low: float, high: float, g: torch.Generator) -> Tensor:
    return torch.rand(n, generator=g) * (high - low) + low


def stroke(layers: Tensor, share: float, g: torch.Generator) -> Tensor:
    """Thicken or thin the ink (channel 0) of some rows by about a pixel."""
    for sign in (1, -1):
        rows = _some(len(layers), share / 2, g)
        ink = layers[rows, :1]
        moved = sign * F.max_pool2d(sign * ink, 3, 1, 1)
        # Part of a pixel: mix the moved ink with the old.
        mix = _between(len(rows), 0.3, 1.0, g).view(-1, 1, 1, 1)
        layers[rows, :1] = ink * (1 - mix) + moved * mix
    return layers


def warp(layers: Tensor, strong: Tensor, g: torch.Generator) -> Tensor:
    """Rotate, shear, scale, shift and bend every row, and bring it to the model's size.

    `strong` marks rows (glyphs) that take larger shears and an elastic bend, as handwriting does.
    """
    n = len(layers)
    s = strong.float()
    angle = _between(n, -1, 1, g) * (0.16 + 0.14 * s)
    shear = _between(n, -1, 1, g) * (0.12 + 0.33 * s)
    size = _between(n, 0.72, 1.08, g) * (1 - s) + _between(n, 0.62, 1.05, g) * s
    aspect = torch.exp(_between(n, -1, 1, g) * (0.1 + 0.25 * s))
    sx, sy = 1 / (size * aspect.sqrt()), aspect.sqrt() / size
    cos, sin = torch.cos(angle), torch.sin(angle)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = cos * sx, (-sin + shear) * sx
    theta[:, 1, 0], theta[:, 1, 1] = sin * sy, cos * sy
    # Small pictures may sit anywhere; large ones stay near the middle.
    room = (1 - size).clamp(min=0.04)
    theta[:, 0, 2] = _between(n, -1, 1, g) * room
    theta[:, 1, 2] = _between(n, -1, 1, g) * room
    grid = F.affine_grid(theta, (n, 1, IMAGE_SIZE, IMAGE_SIZE), align_corners=False)
    rows = _some(n, 0.9, g)
    rows = rows[strong[rows]]
    if len(rows):
        knots = torch.randn(len(rows), 2, 4, 4, generator=g)
        knots *= _between(len(rows), 0.0, 0.17, g).view(-1, 1, 1, 1)
        bend = F.interpolate(knots, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=True)
        grid[rows] += bend.permute(0, 2, 3, 1)
    return F.grid_sample(layers, grid, padding_mode="zeros", align_corners=False)


def _colours(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ink and ground of each row: mostly dark on light or light on dark, sometimes any two."""
    dark, light = _between(n, 0, 0.25, g), _between(n, 0.75, 1, g)
    ink, ground = dark[:, None].repeat(1, 3), light[:, None].repeat(1, 3)
    pure = _some(n, 0.35, g)
    ink[pure], ground[pure] = 0.0, 1.0
    tinted = _some(n, 0.3, g)
    ink[tinted] = torch.rand(len(tinted), 3, generator=g) * 0.6
    ground[tinted] = 1 - torch.rand(len(tinted), 3, generator=g) * 0.4
    swap = _some(n, 0.4, g)
    ink[swap], ground[swap] = ground[swap], ink[swap].clone()
    return ink.view(n, 3, 1, 1), ground.view(n, 3, 1, 1)


def paint(layers: Tensor, coloured: Tensor, g: torch.Generator) -> Tensor:
    """Compose pictures in [0, 1]. Channels: ink, enclosed area, and red, green, blue of `coloured`.

    Some outlines get a shaded inside, as a photo of a solid thing has.
    """
    n = len(layers)
    ink, ground = _colours(n, g)
    inside = layers[:, 1:2] * 0
    rows = _some(n, 0.25, g)
    inside[rows] = layers[rows, 1:2] * _between(len(rows), 0.3, 1, g).view(-1, 1, 1, 1)
    shade = F.interpolate(
        torch.rand(n, 1, 5, 5, generator=g), (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear"
    )
    # Half way to the ink's colour and uneven, over what the ink encloses.
    fill = ground + (ink - ground) * (0.35 + 0.55 * shade)
    picture = ground * (1 - inside) + fill * inside
    uneven = torch.zeros(n, 1, 1, 1)
    uneven[_some(n, 0.2, g)] = 0.45
    alpha = layers[:, :1] * (1 - uneven * shade)
    picture = picture * (1 - alpha) + ink * alpha
    if coloured.any():
        own, a = layers[coloured, 2:], layers[coloured, :1]
        shown = ground[coloured] * (1 - a) + own  # own colours are stored times alpha
        grey = _some(len(own), 0.4, g)
        shown[grey] = shown[grey].mean(1, keepdim=True)
        turned = _some(len(own), 0.25, g)
        shown[turned] = 1 - shown[turned]
        picture[coloured] = shown
    return picture


def degrade(picture: Tensor, strong: Tensor, g: torch.Generator) -> Tensor:
    """Blur, lower resolution and noise, each for a share of the rows."""
    n = len(picture)
    share = torch.where(strong, 0.55, 0.18)
    low = torch.rand(n, generator=g) < share
    sizes = (8, 10, 12, 16, 20)
    # Icons keep enough pixels to be told apart; glyphs go down to what a digit still shows at.
    first = torch.where(strong, 0, 2)
    choice = first + (torch.rand(n, generator=g) * (len(sizes) - first)).long()
    for k, size in enumerate(sizes):
        rows = (low & (choice == k)).nonzero()[:, 0]
        if size == 8:
            extra = strong & (torch.rand(n, generator=g) < 0.15)
            rows = torch.unique(torch.cat([rows, extra.nonzero()[:, 0]]))
        if len(rows):
            small = F.interpolate(picture[rows], (size, size), mode="area")
            picture[rows] = F.interpolate(small, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic")
    rows = _some(n, 0.2, g)
    picture[rows] = F.avg_pool2d(picture[rows], 3, 1, 1, count_include_pad=False)
    contrast = torch.exp(_between(n, -1, 1, g) * 0.15).view(n, 1, 1, 1)
    picture = (picture - 0.5) * contrast + 0.5
    rows = _some(n, 0.3, g)
    amount = _between(len(rows), 0, 0.12, g).view(-1, 1, 1, 1)
    picture[rows] += torch.randn(picture[rows].shape, generator=g) * amount
    return picture.clamp(0, 1)


def augment(layers: Tensor, coloured: Tensor, strong: Tensor, g: torch.Generator) -> Tensor:
    """Pixel values for the model, from float layers [n, 5, 48, 48] (see `paint`)."""
    layers = stroke(layers, 0.35, g)
    layers[strong] = stroke(layers[strong], 0.5, g)
    layers = warp(layers, strong, g)
    picture = degrade(paint(layers, coloured, g), strong, g)
    return (picture - 0.5) / 0.5


def cosine(step: int, steps: int, warmup: int) -> float:
    """The learning rate's factor: a linear warm-up and half a cosine down to nearly nothing."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
