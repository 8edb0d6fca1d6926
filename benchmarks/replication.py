"""The quickstart by fedclip and by plain PEFT (`examples/plain_peft.py`), on the same splits.

python benchmarks/replication.py    three seeds, about five minutes of one core
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, write_result

SEEDS = (0, 1, 2)
EXAMPLE = ROOT / "examples" / "plain_peft.py"


def plain_peft() -> Any:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("plain_peft", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Both programs for each seed, and the distance of their means."""
    runs = []
    for seed in SEEDS:
        folder = ROOT / "runs" / "replication" / f"seed{seed}"
        if not (folder / "summary.json").exists():
            command = [sys.executable, "-m", "fedclip", "run", "configs/quickstart.yaml"]
            command += [f"seed={seed}", "--output", str(folder)]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        accuracy = plain_peft().main(folder)
        runs.append(
            {
                "seed": seed,
                "fedclip": summary["accuracy"],
                "plain_peft": accuracy[-1],
                "zero_shot_fedclip": summary["zero_shot_accuracy"],
                "zero_shot_plain_peft": accuracy[0],
            }
        )
    means = {name: statistics.fmean(r[name] for r in runs) for name in ("fedclip", "plain_peft")}
    figures = {**means, "difference": means["fedclip"] - means["plain_peft"]}
    details = {"command": "python benchmarks/replication.py", "runs": runs}
    print(write_result("replication", figures, details))


if __name__ == "__main__":
    main()
