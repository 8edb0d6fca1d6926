"""What the tests of image-caption pairs share."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250,) * 3}


def picture(colour: str, number: int = 0) -> Image.Image:
    """A square of a colour, and noise of its own."""
    noise = np.random.default_rng(number).integers(-20, 20, (12, 12, 3))
    return Image.fromarray(np.clip(noise + COLOURS[colour], 0, 255).astype(np.uint8))


def rows_of(count: int, sites: int = 0) -> list[dict[str, str]]:
    """So many pairs, colour after colour; each site has all of them."""
    colours = list(COLOURS)
    rows = []
    for number in range(count):
        colour = colours[number % len(colours)]
        row = {"image": f"images/{number}.png", "caption": f"a {colour} square"}
        rows.append(row | ({"site": f"site {number // len(colours) % sites}"} if sites else {}))
    return rows


def write_pairs(folder: Path, rows: list[dict[str, str]], name: str = "pairs.csv") -> Path:
    """A table of these pairs, and the images that they name."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        colour = next((c for c in COLOURS if c in row.get("caption", "")), "white")
        if row.get("image"):
            picture(colour, number).save(folder / row["image"])
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return folder / name
