"""A federation on this machine: a coordinator and three sites as processes, with TLS and keys.

python scripts/federation.py [FOLDER]     # FOLDER is new; by default runs/federation

Each site has a folder of images of its own: handwritten digits, written out as PNG files. What is
in FOLDER afterwards is what real machines would have, each its part.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from fedclip.deploy.addresses import free_port
from fedclip.deploy.keys import folder as keys

SITES = {"north": (0, 500), "south": (500, 900), "west": (900, 1400)}
TEST = (1400, 1797)

COORDINATOR = """\
model: {{model_name: tiny, lora: {{r: 8, lora_alpha: 16}}}}
client: {{local_epochs: 2, learning_rate: 1e-2}}
optimizer: {{schedule: cosine}}
data: {{name: imagefolder, path: {folder}/test, layout: classes}}
federation: {{rounds: 5}}
deploy: {{address: "127.0.0.1:{port}", keys: {folder}/keys, round_deadline: 120}}
"""
SITE = """\
name: {name}
coordinator: localhost:{port}
keys: ../keys/sites/{name}
state: ../state/{name}
data: {{path: ../images/{name}}}
"""


def write_images(folder: Path, first: int, last: int) -> None:
    """Digits first to last as `<class>/*.png`."""
    digits = load_digits()
    for index in range(first, last):
        place = folder / str(digits.target[index])
        place.mkdir(parents=True, exist_ok=True)
        picture = (digits.images[index] * 255 / 16).astype(np.uint8)
        Image.fromarray(picture).save(place / f"{index:04}.png")


def prepare(folder: Path) -> None:
    """Images, keys and configurations."""
    port = free_port()
    write_images(folder / "test", *TEST)
    keys.init(folder / "keys", ["localhost"])
    (folder / "sites").mkdir()
    for name, (first, last) in SITES.items():
        write_images(folder / "images" / name, first, last)
        keys.site(folder / "keys", name)
        (folder / f"sites/{name}.yaml").write_text(SITE.format(name=name, port=port))
    (folder / "coordinator.yaml").write_text(COORDINATOR.format(folder=folder, port=port))


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """A command of fedclip's."""
    return subprocess.Popen([sys.executable, "-m", "fedclip", *arguments])


def main() -> int:
    """Prepares the folder, if it is new, and carries the federation out."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/federation").absolute()
    if not folder.exists():
        folder.mkdir(parents=True)
        prepare(folder)
    started = time.monotonic()
    sites = [start("site", "--config", f"{folder}/sites/{name}.yaml") for name in SITES]
    try:
        code = start("coordinate", f"{folder}/coordinator.yaml", "-o", f"{folder}/run").wait()
    finally:
        for site in sites:
            site.terminate()
        for site in sites:
            site.wait()
    print(f"{time.monotonic() - started:.0f} s")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
