"""The `icons` data set: 32 x 32 pictures of the held-out families, split by drawing."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from rich.progress import track

from . import concepts, dedupe, families, render

PER_CELL = 20  # pictures of one concept in one family: state variants beyond are dropped
TEST_SHARE = 0.35
# Bits of 256 by which two pictures of one concept may differ and still be one drawing.
WITHIN, ACROSS = 10, 4


def collect(package: Path, seed: int) -> dict[str, list]:
    """Every picture that counts, with its concept, family, name and its drawing's name."""
    rng = random.Random(seed)
    out: dict[str, list] = {"image": [], "hash": [], "label": [], "family": [], "base": []}
    for f, family in track(list(enumerate(families.HELD_OUT)), description="icons data set"):
        cells: dict[int, list] = {}
        for icon in families.read_family(package, family):
            named = concepts.read_name(icon.name)
            if named:
                label = concepts.CLASS_NAMES.index(named[0])
                cells.setdefault(label, []).append((len(icon.name), icon, named[1]))
        for label, cell in sorted(cells.items()):
            # Shortest names first: the plain drawing always stays, the odd state may go.
            cell.sort(key=lambda item: (item[0], rng.random()))
            seen: set[bytes] = set()
            for _, icon, base in cell:
                picture, large = render.dark_on_white(icon.svg), render.rgba(icon.svg, render.SIZE)
                if picture is None or large is None or picture.min() > 160:
                    continue
                if len(seen) >= PER_CELL or picture.tobytes() in seen:
                    continue
                seen.add(picture.tobytes())
                out["image"].append(picture)
                out["hash"].append(dedupe.image_hash(dedupe.ink_of(large)))
                out["label"].append(label)
                out["family"].append(f)
                out["base"].append(base)
    return out


def drawings(found: dict[str, list]) -> np.ndarray:
    """A drawing id for each picture: shared by variants of a name and by near-duplicate pictures.

    Across families only all but equal pictures are joined, as two families may share a drawing.
    """
    first: dict[tuple, int] = {}
    pairs = []
    keys = zip(found["family"], found["label"], found["base"], strict=True)
    for i, key in enumerate(keys):
        pairs.append((first.setdefault(key, i), i))
    labels, family = np.array(found["label"]), np.array(found["family"])
    for label in range(len(concepts.CLASS_NAMES)):
        mine = np.flatnonzero(labels == label)
        hashes = np.stack([found["hash"][i] for i in mine])
        same = set(dedupe.near_pairs(hashes, near=ACROSS))
        for a, b in dedupe.near_pairs(hashes, near=WITHIN):
            if family[mine[a]] == family[mine[b]] or (a, b) in same:
                pairs.append((int(mine[a]), int(mine[b])))
    return np.unique(dedupe.components(len(labels), pairs), return_inverse=True)[1]


def split(found: dict[str, list], drawing: np.ndarray, seed: int) -> np.ndarray:
    """0 for train, 1 for test, one side a drawing; about `TEST_SHARE` of every family is test."""
    rng = random.Random(seed)
    family, label = np.array(found["family"]), np.array(found["label"])
    side = np.full(len(label), -1)
    members = {d: np.flatnonzero(drawing == d) for d in np.unique(drawing)}
    test = np.zeros(len(families.HELD_OUT))
    seen = np.zeros(len(families.HELD_OUT))
    test_of_label = np.zeros(len(concepts.CLASS_NAMES))
    seen_of_label = np.zeros(len(concepts.CLASS_NAMES))
    order = sorted(members, key=lambda d: (-len(members[d]), rng.random()))
    for d in order:
        rows = members[d]
        homes, counts = np.unique(family[rows], return_counts=True)
        lab = label[rows[0]]
        # Whichever side keeps the families' and the concept's share closest to the target.
        short = TEST_SHARE * (seen[homes] + counts) - test[homes] - counts / 2
        short_label = TEST_SHARE * (seen_of_label[lab] + len(rows)) - test_of_label[lab]
        goes = (short * counts).sum() / len(rows) + 0.5 * (short_label - len(rows) / 2) > 0
        side[rows] = int(goes)
        seen[homes] += counts
        seen_of_label[lab] += len(rows)
        if goes:
            test[homes] += counts
            test_of_label[lab] += len(rows)
    return side


def build(package: Path, folder: Path, seed: int = 0) -> dict:
    """Write `icons.npz` and `LICENSES.md` to `folder`; returns the counts."""
    found = collect(package, seed)
    drawing = drawings(found)
    side = split(found, drawing, seed)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / "icons.npz",
        images=np.stack(found["image"]),
        label=np.array(found["label"], np.int16),
        family=np.array(found["family"], np.int16),
        drawing=drawing.astype(np.int32),
        split=side.astype(np.int8),
        class_names=np.array(concepts.CLASS_NAMES),
        family_names=np.array(families.HELD_OUT),
    )
    (folder / "LICENSES.md").write_text(licences(package))
    cells = {(f, c) for f, c in zip(found["family"], found["label"], strict=True)}
    per_family = [sum(1 for g, _ in cells if g == f) for f in range(len(families.HELD_OUT))]
    return {
        "images": len(side),
        "test": int(side.sum()),
        "families": len(families.HELD_OUT),
        "concepts": len(concepts.CLASS_NAMES),
        "fewest concepts of a family": min(per_family),
        "drawings": int(drawing.max()) + 1,
    }


def licences(package: Path) -> str:
    """The licence and author of each held-out family, as Markdown."""
    lines = [
        "# Licences of the icons data set",
        "",
        f"The pictures in `icons.npz` are rendered from `{families.ICONIFY}` "
        f"{families.ICONIFY_VERSION}. Each family keeps its author's licence.",
        "",
        "| Family | Name | Author | Licence |",
        "| --- | --- | --- | --- |",
    ]
    known = families.collections(package)
    for family in families.HELD_OUT:
        info = known[family]
        author, licence = info["author"], info["license"]
        who = f"[{author['name']}]({author['url']})" if author.get("url") else author["name"]
        what = f"[{licence['spdx']}]({licence['url']})" if licence.get("url") else licence["spdx"]
        lines.append(f"| `{family}` | {info['name']} | {who} | {what} |")
    return "\n".join(lines) + "\n"
