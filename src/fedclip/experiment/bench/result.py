"""Result files: figures, and the machine, versions and commit that they were measured with."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from fedclip import files
from fedclip.experiment.bench.digest import code_digests

_PACKAGES = ("fedclip", "torch", "transformers", "peft", "datasets", "flwr-datasets", "numpy")
_CHECKOUT = Path(__file__).resolve().parents[4]


def write_result(
    path: Path,
    name: str,
    figures: Mapping[str, Any],
    details: Mapping[str, Any],
    made_by: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a result file: flat figures by key, and whatever explains them under `details`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result(name, figures, details, made_by), indent=2, ensure_ascii=False)
    files.replace_file(path, text.encode() + b"\n")
    return path


def result(
    name: str,
    figures: Mapping[str, Any],
    details: Mapping[str, Any],
    made_by: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a result file holds; `made_by` is the code that measured, by default this one."""
    return {
        "name": name,
        "machine": machine(),
        "versions": {package: version(package) for package in _PACKAGES},
        **(made_by or present_code()),
        "date": datetime.now(UTC).date().isoformat(),
        "figures": dict(figures),
        "details": dict(details),
    }


def present_code() -> dict[str, Any]:
    """The commit, and digests of what decides figures."""
    return {"commit": commit(), "code": code_digests()}


def code_of(work: Path) -> dict[str, Any]:
    """The code that began a work folder's runs; they are not repeated when it changes."""
    file = work / "code.json"
    if not file.exists():
        text = json.dumps(present_code(), indent=2)
        files.replace_file(file, text.encode() + b"\n")
    begun: dict[str, Any] = files.read_json(file)
    return {"commit": begun.get("commit"), "code": begun.get("code")}


def machine() -> dict[str, Any]:
    """Processor, cores and memory, without anything that names the machine."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        **gpu,
        "system": platform.system(),
        "python": platform.python_version(),
    }


def commit(checkout: Path = _CHECKOUT) -> str | None:
    """The commit that was measured, marked `-dirty` when files differ.

    Outside a checkout, such as on a machine that has a copy, what FEDCLIP_COMMIT says, or None.
    """
    if not (checkout / ".git").exists():
        return os.environ.get("FEDCLIP_COMMIT")
    tracked = ["status", "--porcelain", "--untracked-files=no", "--", "src", "configs"]
    head, changed = (_git(checkout, *words) for words in (["rev-parse", "HEAD"], tracked))
    return f"{head}-dirty" if head and changed else head


def _git(checkout: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], cwd=checkout, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
