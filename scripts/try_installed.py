"""Use an installed fedclip as a newcomer does, far from any checkout, without a network.

    cd EMPTY_FOLDER && PYTHON /path/to/scripts/try_installed.py README.md

PYTHON is the environment into which a wheel was installed, with the extra `serve`; README.md is
where the block of Python is that must work. Photographs of three classes are made on the way.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

# Nobody answers there: whatever asks for a network fails, but for this machine itself.
DEAD = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
OFFLINE = {**os.environ, **DEAD, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}


def main() -> None:
    """Goes through all of it; a command that fails ends it."""
    readme = Path(sys.argv[1]).read_text("utf-8")
    _photographs(Path("photos"))
    installed = _call("-c", "import fedclip; print(fedclip.__version__, fedclip.__file__)")
    assert str(Path(sys.prefix).resolve()) in str(Path(installed.split()[1]).resolve()), installed
    assert installed.split()[0] in _fedclip("--version")
    assert "quickstart" in _fedclip("configs")
    assert "1,797" in _fedclip("validate", *_copied("quickstart"), "--data")
    _fedclip("init", "--data", "photos", "-o", "mine.yaml")
    told = json.loads(_fedclip("doctor", "mine.yaml", "--json"))
    assert told["round_seconds"] > 0
    _fedclip("run", "mine.yaml", "federation.rounds=2", "-o", "runs/first")
    summary = json.loads(Path("runs/first/summary.json").read_text())
    assert summary["rounds"] == 2
    _fedclip("report", "runs/first", "-o", "page.html")
    assert Path("page.html").read_text("utf-8").count("<svg") >= 2
    assert "red" in _fedclip("predict", "runs/first", "photos/red/0.jpg", "--json")
    _served("runs/first")
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)
    assert blocks
    for block in blocks:  # a hub model needs a network: the block says which one does not
        _call("-c", block.replace("openai/clip-vit-base-patch32", "tiny"))
    print(f"all works: fedclip {installed.strip()}")


def _copied(name: str) -> list[str]:
    _fedclip("configs", name, "-o", f"{name}.yaml")
    return [f"{name}.yaml"]


def _photographs(folder: Path) -> None:
    """Twelve pictures each of three colours, with noise."""
    random = np.random.default_rng(0)
    for place, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 90, (64, 64, 3), np.uint8)
            pixels[..., place] += 150
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")


def _served(run: str) -> None:
    """The page and an answer of `fedclip serve`, which ends on Ctrl-C."""
    command = [sys.executable, "-m", "fedclip", "serve", run, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=OFFLINE) as process:
        assert process.stderr
        said = ""
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", said)):
            said += process.stderr.readline()
            assert process.poll() is None, said
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        page = opener.open(found[0]).read().decode()
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert "<html" in page
    assert process.returncode == 130


def _fedclip(*words: str) -> str:
    return _call("-m", "fedclip", *words)


def _call(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=OFFLINE, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)}\nended with code {done.returncode}\n{done.stderr}")
    return done.stdout + done.stderr if "--json" not in words else done.stdout


if __name__ == "__main__":
    main()
