"""Icon families: which may be used, which are held out, and how their icons are read."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ICONIFY = "@iconify/json"
ICONIFY_VERSION = "2.2.535"

PERMISSIVE = {
    "MIT", "Apache-2.0", "CC0-1.0", "ISC", "OFL-1.1", "Unlicense", "BSD-3-Clause",
}  # fmt: skip

# Held out: whole families, of different authors and styles. No training run sees any of them, and
# the `icons` data set is made of them alone. No author whom the package names has families on both
# sides; one person may stand behind two names: `zondicons` (held out) is by Steve Schoger, and
# `heroicons` (trained on) by Refactoring UI, of which he is a founder.
HELD_OUT = (
    "mingcute", "pixelarticons", "ri", "jam", "carbon", "clarity", "eva", "vaadin", "proicons",
    "teenyicons", "system-uicons", "grommet-icons", "iconoir", "humbleicons", "mage", "tdesign",
    "charm", "zondicons", "oi", "flowbite", "gravity-ui", "majesticons", "akar-icons", "f7", "gg",
    "fontisto", "prime", "picon", "bi", "ant-design", "fe", "at-icons", "octicon",
    "qlementine-icons",
)  # fmt: skip

# Logos, coins, flags and file-type badges teach names that no drawing explains; the two glued
# families write captions without spaces ("barchartalt").
DROPPED_CATEGORIES = {"Logos", "Programming"}
DROPPED = {
    "circle-flags", "flag", "flagpack", "cif", "svg-spinners", "ginetex", "bpmn", "geo",
    "bitcoin-icons", "whh", "fxemoji", "academicons",
}  # fmt: skip

# Families known to share drawings (versions, forks, editions of one set): a group never straddles
# the line, which tests/models/test_tiny.py checks. What is not known, `dedupe` finds by image hash.
GROUPS = (
    ("material-symbols", "material-symbols-light", "ic", "mdi", "mdi-light", "zmdi", "line-md"),
    ("feather", "lucide", "lucide-lab", "meteor-icons"),
    ("fa", "la"),
    ("boxicons", "bx", "bxs", "bxl"),
    ("uil", "uim", "uit", "uis"),
    ("icon-park", "icon-park-outline", "icon-park-solid", "icon-park-twotone"),
    ("ion", "famicons"),
    ("fluent", "fluent-mdl2", "fluent-color"),
    ("fluent-emoji", "fluent-emoji-flat", "fluent-emoji-high-contrast"),
    ("heroicons", "heroicons-outline", "heroicons-solid", "sidekickicons"),
    ("mi", "mono-icons"),
    ("noto", "noto-v1"),
    ("glyphs", "glyphs-poly"),
    ("icons8", "wpf"),
    ("maki", "temaki", "pinhead", "osmic"),
    ("mynaui", "vadivam"),
    ("memory", "mdi"),
)


@dataclass(frozen=True)
class Icon:
    """One icon of one family: its drawing and the words that name it."""

    family: str
    name: str
    svg: str
    aliases: tuple[str, ...]


def fetch_iconify(work: Path) -> Path:
    """The unpacked `@iconify/json`, fetched with `npm pack` into `work` where it is missing."""
    package = work / "package"
    if not (package / "collections.json").exists():
        spec = f"{ICONIFY}@{ICONIFY_VERSION}"
        subprocess.run(["npm", "pack", "--silent", spec], cwd=work, check=True)
        archive = work / f"iconify-json-{ICONIFY_VERSION}.tgz"
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")
    version = json.loads((package / "package.json").read_text())["version"]
    if version != ICONIFY_VERSION:
        raise SystemExit(f"{package} holds {ICONIFY} {version}; this script pins {ICONIFY_VERSION}")
    return package


def collections(package: Path) -> dict[str, dict]:
    """What `collections.json` says of each permissively licensed family."""
    every = json.loads((package / "collections.json").read_text())
    return {k: v for k, v in every.items() if v["license"].get("spdx") in PERMISSIVE}


def training_families(package: Path) -> list[str]:
    """Families that pretraining may use: permissive, not held out, not dropped."""
    return [
        name
        for name, info in collections(package).items()
        if name not in HELD_OUT
        and name not in DROPPED
        and info.get("category") not in DROPPED_CATEGORIES
    ]


def read_family(package: Path, family: str) -> Iterator[Icon]:
    """Every visible icon of a family, as an SVG of its own view box with black for currentColor."""
    data = json.loads((package / "json" / f"{family}.json").read_text())
    aliases: dict[str, list[str]] = {}
    for alias, entry in data.get("aliases", {}).items():
        # An alias that turns or flips its parent is another picture.
        if not {"rotate", "hFlip", "vFlip"} & entry.keys() and not entry.get("hidden"):
            aliases.setdefault(entry["parent"], []).append(alias)
    width, height = data.get("width", 16), data.get("height", 16)
    for name, icon in data["icons"].items():
        if icon.get("hidden"):
            continue
        w, h = icon.get("width", width), icon.get("height", height)
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {w} {h}"
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" '
            'xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
            f'width="{w}" height="{h}" viewBox="{box}">{icon["body"]}</svg>'
        )
        yield Icon(family, name, svg, tuple(aliases.get(name, ())))


def is_coloured(info: dict) -> bool:
    """Whether a family's icons carry their own colours."""
    return bool(info.get("palette"))
