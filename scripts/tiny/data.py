"""Batches: icons from the cache and glyphs, with captions and what counts as a negative."""

from __future__ import annotations

import json
import random
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import captions, glyphs

# The parts of a batch. Glyphs are few but many-sided: their warps are as wide as handwriting's.
SHARES = {"digit": 0.18, "letter": 0.08, "word": 0.03}
FAMILY_CAP = 2500  # icons of a family that count fully: beyond, a family is drawn as if it had so
TEMPER = -0.2  # how strongly common names are thinned
VALIDATION_KEYS = 100
HASHED_WORDS = 2048


@dataclass
class Batch:
    """A part of a step's layers (see `augment.paint`), marks and captions, and the whole batch's
    relations between keys."""

    layers: Tensor
    coloured: Tensor
    strong: Tensor
    captions: list[str]
    positive: Tensor
    ignored: Tensor


class Data:
    """The training data: icons read memory-mapped, glyphs in memory."""

    def __init__(self, work: Path, seed: int) -> None:
        rows = json.loads((work / "pool/rows.json").read_text())
        keep = np.load(work / "pool/keep.npy")
        self.pictures = np.load(work / "pool/rgba.npy", mmap_mode="r")
        self.inner = np.load(work / "pool/inner.npy", mmap_mode="r")
        self.keys = [r[2] for r in rows]
        self.variants = [captions.phrase_variants(r[2], tuple(r[3])) for r in rows]
        self.families = [r[0] for r in rows]
        rng = np.random.default_rng(seed)
        kept = np.flatnonzero(keep)
        common = Counter(self.keys[i] for i in kept).most_common(VALIDATION_KEYS)
        self.validation_keys = [k for k, _ in common]
        index = {k: n for n, k in enumerate(self.validation_keys)}
        candidates = [i for i in kept if self.keys[i] in index]
        self.validation = np.sort(rng.choice(candidates, len(candidates) // 5, replace=False))
        self.validation_labels = np.array([index[self.keys[i]] for i in self.validation])
        self.icons = np.setdiff1d(kept, self.validation)
        self.cumulative = self._weights(self.icons).cumsum()
        words = [k for k, n in Counter(self.keys).items() if n > 8 and k.isalpha() and len(k) < 9]
        masks, inside, self.glyph_rows = glyphs.build(sorted(words), seed)
        self.masks, self.mask_inner = masks, inside
        self.by_kind = {
            kind: np.array([i for i, r in enumerate(self.glyph_rows) if r["kind"] == kind])
            for kind in SHARES
        }

    def _weights(self, icons: np.ndarray) -> np.ndarray:
        family = Counter(self.families[i] for i in icons)
        key = Counter(self.keys[i] for i in icons)
        weights = [
            min(1.0, FAMILY_CAP / family[self.families[i]]) * key[self.keys[i]] ** TEMPER
            for i in icons
        ]
        return np.array(weights) / np.sum(weights)

    def counts(self) -> dict:
        """How many icons train, of each family, and how many are kept back."""
        return {
            "icons used of each family": dict(Counter(self.families[i] for i in self.icons)),
            "kept back for validation": len(self.validation),
        }

    def icon_layers(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Float layers of these icons, and which of them carry colours."""
        picture = torch.from_numpy(self.pictures[rows]).permute(0, 3, 1, 2).float() / 255
        inner = torch.from_numpy(self.inner[rows])[:, None].float() / 255
        alpha, own = picture[:, 3:], picture[:, :3]
        coloured = (own * alpha).amax((1, 2, 3)) > 0.1
        return torch.cat([alpha, inner, own * alpha], 1), coloured

    def batch(self, size: int, seed: int, step: int, part: slice) -> Batch:
        """A part of the step's batch: the same for the same seed and step, whatever ran before.

        Every process draws the whole batch's rows and captions, as the loss needs all keys, and
        reads the pictures of its own part alone.
        """
        rng = np.random.default_rng([seed, step])
        words = random.Random(f"{seed}/{step}")
        counts = {kind: round(size * share) for kind, share in SHARES.items()}
        drawn = np.searchsorted(self.cumulative, rng.random(size - sum(counts.values())))
        icons = self.icons[drawn.clip(max=len(self.icons) - 1)]
        glyph = np.concatenate([rng.choice(self.by_kind[k], n) for k, n in counts.items()])
        texts = [captions.caption(words, self.variants[i]) for i in icons]
        texts += [words.choice(self.glyph_rows[i]["captions"]) for i in glyph]
        keys = [self.keys[i] for i in icons] + [self.glyph_rows[i]["key"] for i in glyph]
        order = rng.permutation(size)
        texts, keys = [texts[i] for i in order], [keys[i] for i in order]
        mine = np.sort(order[part])
        layers, coloured = self.icon_layers(icons[mine[mine < len(icons)]])
        letters = self.glyph_layers(glyph[mine[mine >= len(icons)] - len(icons)])
        layers = torch.cat([layers, letters])
        strong = torch.from_numpy(mine >= len(icons))
        coloured = torch.cat([coloured, torch.zeros(len(letters), dtype=torch.bool)])
        # Rows were sorted to read icons and glyphs apiece: put them back in the batch's order.
        back = torch.from_numpy(np.argsort(np.argsort(order[part])))
        relation = relations(keys)
        return Batch(layers[back], coloured[back], strong[back], texts[part], *relation)

    def glyph_layers(self, rows: np.ndarray) -> Tensor:
        """Float layers of these glyphs."""
        layers = torch.zeros(len(rows), 5, *self.masks.shape[1:])
        layers[:, 0] = torch.from_numpy(self.masks[rows]).float() / 255
        layers[:, 1] = torch.from_numpy(self.mask_inner[rows]).float() / 255
        return layers


def relations(keys: list[str]) -> tuple[Tensor, Tensor]:
    """Which pairs say the same, and which neither match nor differ.

    A truck with a minus sign is no wrong picture for "truck": where one key's words contain the
    other's, the pair is left out of the loss.
    """
    bags = torch.zeros(len(keys), HASHED_WORDS)
    for i, key in enumerate(keys):
        for word in key.split(" "):
            bags[i, zlib.crc32(word.encode()) % HASHED_WORDS] = 1
    sizes = bags.sum(1)
    shared = bags @ bags.T
    numbers = torch.tensor([zlib.crc32(k.encode()) for k in keys])
    positive = numbers[:, None] == numbers[None]
    contained = shared >= torch.minimum(sizes[:, None], sizes[None])
    return positive, contained & ~positive
