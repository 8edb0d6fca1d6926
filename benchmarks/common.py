"""What all benchmarks share: where they ran, and how a result file looks."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("fedclip", "torch", "transformers", "peft", "datasets", "flwr-datasets", "numpy")


def write_result(
    name: str, figures: Mapping[str, float], details: Mapping[str, Any], folder: Path = RESULTS
) -> Path:
    """Writes `<name>.json`: flat figures by key, and whatever explains them under `details`."""
    result = {
        "name": name,
        "machine": machine(),
        "versions": {package: version(package) for package in _PACKAGES},
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "figures": dict(figures),
        "details": dict(details),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def machine() -> dict[str, Any]:
    """Processor, cores and memory, without anything that names the machine."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gb": round(memory, 1),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit that was measured, with a mark when files differ from it."""
    here = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    head = subprocess.run(["git", "rev-parse", "HEAD"], **here).stdout.strip()
    tracked = ["git", "status", "--porcelain", "--untracked-files=no", "--", "src", "configs"]
    changed = subprocess.run(tracked, **here).stdout.strip()
    return f"{head}-dirty" if changed else head


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
