"""The cache of rendered icons, made once and read memory-mapped by training.

`pool/` holds, one row an icon: `rgba.npy` (uint8 [n, 48, 48, 4]), `inner.npy` (what its outlines
enclose), `hash.npy`, and `rows.json` (family, name, key, aliases). `heldout/` holds hashes alone.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from rich.progress import track

from . import captions, dedupe, families, render

PER_KEY = 2  # icons of one concept that one family may give: styles and sizes beyond are dropped


def choose(package: Path, seed: int) -> list[families.Icon]:
    """The training icons before de-duplication: at most `PER_KEY` of one concept in a family."""
    rng = random.Random(seed)
    chosen = []
    for family in families.training_families(package):
        emoji = "emoji" in family or family.startswith("noto")
        by_key: dict[str, list[families.Icon]] = {}
        for icon in families.read_family(package, family):
            flag = icon.name.startswith("flag-") and emoji
            if not flag and not (emoji and captions.is_skin_variant(icon.name)):
                by_key.setdefault(captions.key_of(icon.name), []).append(icon)
        for icons in by_key.values():
            chosen += rng.sample(icons, min(PER_KEY, len(icons)))
    return chosen


def _render(icons: list[families.Icon], label: str):
    """Renderings and ink hashes, with progress; failures are left out."""
    stream = render.render_many([i.svg for i in icons])
    for icon, picture in track(
        zip(icons, stream, strict=True), total=len(icons), description=label
    ):
        if picture is not None:
            yield icon, picture, dedupe.image_hash(dedupe.ink_of(picture))


def build_heldout(package: Path, work: Path) -> None:
    """Hashes of every icon of the held-out families."""
    folder = work / "heldout"
    if (folder / "rows.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    icons = [i for f in families.HELD_OUT for i in families.read_family(package, f)]
    rows, hashes = [], []
    for icon, _, bits in _render(icons, "held-out icons"):
        rows.append([icon.family, icon.name])
        hashes.append(bits)
    np.save(folder / "hash.npy", np.stack(hashes))
    (folder / "rows.json").write_text(json.dumps(rows))


def build_pool(package: Path, work: Path, seed: int) -> None:
    """Render the training icons into the cache."""
    folder = work / "pool"
    if (folder / "rows.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    icons = choose(package, seed)
    shape = (len(icons), render.SIZE, render.SIZE)
    mode = {"mode": "w+", "dtype": np.uint8}
    pictures = np.lib.format.open_memmap(folder / "rgba.npy", shape=(*shape, 4), **mode)
    inner = np.lib.format.open_memmap(folder / "inner.npy", shape=shape, **mode)
    rows, hashes = [], []
    for icon, picture, bits in _render(icons, "training icons"):
        n = len(rows)
        pictures[n] = picture
        inner[n] = render.interior(picture[..., 3])
        rows.append([icon.family, icon.name, captions.key_of(icon.name), list(icon.aliases)])
        hashes.append(bits)
    pictures.flush(), inner.flush()
    np.save(folder / "hash.npy", np.stack(hashes))
    (folder / "rows.json").write_text(json.dumps(rows))


def mark_duplicates(work: Path) -> dict:
    """Write `pool/keep.npy`: False for icons that a held-out drawing nearly repeats."""
    left, right = np.load(work / "pool/hash.npy"), np.load(work / "heldout/hash.npy")
    distance, index = dedupe.nearest(left, right)
    keep = distance > dedupe.NEAR
    np.save(work / "pool/keep.npy", keep)
    np.save(work / "pool/distance.npy", distance)
    rows = json.loads((work / "pool/rows.json").read_text())
    held = json.loads((work / "heldout/rows.json").read_text())
    total: dict[str, int] = {}
    pairs: dict[str, int] = {}
    for row, kept, near in zip(rows, keep, index, strict=True):
        total[row[0]] = total.get(row[0], 0) + 1
        if not kept:
            pair = f"{row[0]} ~ {held[near][0]}"
            pairs[pair] = pairs.get(pair, 0) + 1
    report = {
        "training icons": len(rows),
        "removed as near-duplicates": int((~keep).sum()),
        "held-out renderings": len(held),
        "icons of each family": total,
        "near-duplicates of each pair": dict(sorted(pairs.items(), key=lambda kv: -kv[1])),
    }
    (work / "pool/duplicates.json").write_text(json.dumps(report, indent=1))
    return report
