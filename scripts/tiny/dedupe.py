"""Image hashes: near-duplicate renderings across the training/held-out line, and within a family.

The hash is 256 bits: the ink is cropped to its box, so that padding and stroke offsets do not hide
a copy, averaged down to 16 x 16 and compared with its own mean.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

BITS = 256
# Two renderings that differ in at most this many of 256 bits count as one drawing.
NEAR = 12


def image_hash(alpha: np.ndarray) -> np.ndarray:
    """The 256 bits of one ink mask (uint8 [h, w], 255 for ink) as int8 of -1 and 1."""
    ink = alpha > 32
    rows, cols = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    if len(rows) == 0:
        return np.ones(BITS, np.int8)
    top, bottom, left, right = rows[0], rows[-1] + 1, cols[0], cols[-1] + 1
    # A square crop keeps a minus sign from becoming a block.
    half = max(bottom - top, right - left) / 2
    cy, cx = (top + bottom) / 2, (left + right) / 2
    box = (cx - half, cy - half, cx + half, cy + half)
    small = Image.fromarray(alpha).resize((16, 16), Image.Resampling.BOX, box=_inside(box, alpha))
    values = np.asarray(small, np.float32).reshape(-1)
    return np.where(values > values.mean(), 1, -1).astype(np.int8)


def _inside(box: tuple, alpha: np.ndarray) -> tuple:
    """The box, clipped to the picture: PIL takes no crop beyond the edge when it resizes."""
    h, w = alpha.shape
    return max(box[0], 0), max(box[1], 0), min(box[2], w), min(box[3], h)


def ink_of(rgba: np.ndarray) -> np.ndarray:
    """What a hash is taken of: ink darkness of an RGBA icon on white."""
    alpha = rgba[..., 3].astype(np.float32) / 255
    luma = rgba[..., :3].astype(np.float32).mean(-1)
    return np.round((255 - luma) * alpha).astype(np.uint8)


def nearest(left: np.ndarray, right: np.ndarray, block: int = 2048) -> tuple:
    """For each hash of `left`, the distance to and index of its nearest hash of `right`."""
    other = right.astype(np.float32).T.copy()
    distance = np.empty(len(left), np.int32)
    index = np.empty(len(left), np.int64)
    for start in range(0, len(left), block):
        dots = left[start : start + block].astype(np.float32) @ other
        best = dots.argmax(1)
        index[start : start + block] = best
        distance[start : start + block] = (BITS - dots[np.arange(len(best)), best]) / 2
    return distance, index


def near_pairs(hashes: np.ndarray, near: int = NEAR, block: int = 2048) -> list[tuple[int, int]]:
    """All pairs within one set that count as one drawing."""
    every = hashes.astype(np.float32)
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(every), block):
        dots = every[start : start + block] @ every.T
        rows, cols = np.nonzero(dots >= BITS - 2 * near)
        pairs += [
            (start + int(r), int(c)) for r, c in zip(rows, cols, strict=True) if c > start + r
        ]
    return pairs


def components(count: int, pairs: list[tuple[int, int]]) -> np.ndarray:
    """The connected component of each of `count` things, given pairs that belong together."""
    parent = list(range(count))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in pairs:
        ra, rb = find(a), find(b)
        if ra != rb:
            parent[max(ra, rb)] = min(ra, rb)
    return np.array([find(i) for i in range(count)])
