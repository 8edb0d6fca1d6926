"""An environment that has fedclip by its wheel, far from the repository."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def install_wheel(folder: Path) -> Path:
    """The Python of an environment in `folder` with fedclip's wheel, and all else from here."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    venv.create(folder / "env", with_pip=False)
    (site_packages,) = (folder / "env/lib").glob("python*/site-packages")
    install = [*pip, "install", "--no-deps", "--target", site_packages]
    subprocess.run([*install, *folder.glob("*.whl")], check=True, capture_output=True)
    # A folder named in a .pth file is searched, but its own .pth files are not followed: the
    # repository, which is installed by one, stays out.
    (site_packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "env/bin/python"
    for script in Path(sys.executable).parent.glob("fl*w*"):  # Flower's, as pip would make them
        _, *lines = script.read_text().splitlines(keepends=True)
        copy = folder / "env/bin" / script.name
        copy.write_text("".join([f"#!{python}\n", *lines]))
        copy.chmod(0o755)
    return python
