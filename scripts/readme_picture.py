"""The picture at the top of the README: the first screen of a run's report, as Chromium shows it.

python scripts/readme_picture.py runs/quickstart-1      writes docs/images/report.png
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "report.png"
WIDTH, HEIGHT = 1100, 1240
COLOURS = 128  # of a page with few; a third of the bytes


def main(run: str) -> None:
    """Take the picture of a run's report."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("neither chromium nor google-chrome is on the path")
    with tempfile.TemporaryDirectory() as place:
        shot = Path(place) / "report.png"
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu"]
        options += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}"]
        page = (Path(run) / "report.html").resolve().as_uri()
        subprocess.run([browser, *options, page], check=True, capture_output=True, timeout=120)
        picture = Image.open(shot).convert("RGB")
    PICTURE.parent.mkdir(exist_ok=True)
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
