"""Makes a virtual environment for each peer: `python -m benchmarks.peer_jobs.environments`.

They lie under `runs/peers/`, which git ignores, and hold exactly what `requirements-<peer>.txt`
pins. An environment that is up to date is left alone, so the command can be run again at any time.
`serial_peft` needs none: it runs in the project's own environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS_FOLDER = HERE.parents[1] / "runs" / "peers"
SERIAL = "serial"
SCRIPTS = {
    SERIAL: HERE / "serial_peft.py",
    "flower": HERE / "flower_simulation.py",
    "pfl": HERE / "pfl_research.py",
    "nvflare": HERE / "nvflare_simulator.py",
}
_INSTALLED = "installed-requirements.txt"


def python_of(peer: str) -> Path:
    """The interpreter that runs a peer's script; this process's own for `serial`."""
    if peer not in SCRIPTS:
        raise ValueError(f"no peer is called {peer!r}; there are {', '.join(SCRIPTS)}")
    return Path(sys.executable) if peer == SERIAL else _python_in(_folder_of(peer))


def make_environment(peer: str) -> bool:
    """Makes or renews a peer's environment; returns whether there was anything to do."""
    folder = _folder_of(peer)
    requirements = HERE / f"requirements-{peer}.txt"
    wanted = requirements.read_text(encoding="utf-8")
    marker = folder / _INSTALLED
    if marker.exists() and marker.read_text(encoding="utf-8") == wanted:
        return False
    venv.create(folder, with_pip=True, clear=True)
    # All versions are given, so pip has nothing to choose; torch's pin keeps CUDA's packages out.
    install = [str(_python_in(folder)), "-m", "pip", "install", "--quiet", "-r", str(requirements)]
    subprocess.run(install, check=True)
    subprocess.run([_python_in(folder), "-m", "pip", "check"], check=True)
    # Written last: an installation that broke off is started anew.
    marker.write_text(wanted, encoding="utf-8")
    return True


def main() -> None:
    """Makes the environments of all peers that need one."""
    for peer in SCRIPTS:
        if peer != SERIAL:
            state = "made" if make_environment(peer) else "is up to date"
            print(f"{peer}: {os.path.relpath(_folder_of(peer))} {state}", flush=True)


def _folder_of(peer: str) -> Path:
    return PEERS_FOLDER / f"env-{peer}"


def _python_in(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


if __name__ == "__main__":
    main()
