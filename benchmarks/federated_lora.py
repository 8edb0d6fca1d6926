"""The comparisons of federated LoRA: grids of `configs/bench/`, and the result files of the pages.

    python benchmarks/federated_lora.py guide            full fine-tuning against LoRA
    python benchmarks/federated_lora.py strategies       all algorithms, on icons and digits
    python benchmarks/federated_lora.py heterogeneity    where exact aggregation pays
    python benchmarks/federated_lora.py layers           target modules and layers
    python benchmarks/federated_lora.py ranks            one rank, ranks by client, dynamic ranks

Each runs its grids by `fedclip bench`, which goes on from where it was stopped, and writes one
result file and its pictures. Together they take a night of two cores.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, ROOT
from fedclip.experiment.bench.result import write_result

GRIDS = {
    "guide": {name: f"guide_{name}" for name in ("digits", "fashion_mnist", "icons", "mnist")},
    "strategies": {"all": "strategies"},
    "heterogeneity": {"all_clients": "heterogeneity", "few_clients": "heterogeneity_few"},
    "layers": {"all": "layers"},
    "ranks": {
        "icons": "ranks",
        "fashion_mnist": "ranks_fashion_mnist",
        "projection": "ranks_projection",
        "dynamic": "dynamic_ranks",
    },
}
# Parameters of ViT-B/32 and of LoRA on q, k, v, out of both towers, from `fedclip info`.
B32 = {"base": 151_277_313, "r8": 983_040, "r16": 1_966_080}


def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(GRIDS)}.")],
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", help="Runs at a time.")] = None,
    work: Annotated[
        Path, typer.Option("--work", help="Folder with a work folder for each grid.")
    ] = ROOT / "runs" / "bench",
    read: Annotated[
        bool, typer.Option("--read", help="Run nothing: take the results that are there.")
    ] = False,
) -> None:
    """Run the grids of a comparison and write its result file."""
    if name not in GRIDS:
        raise typer.BadParameter(f"{name} is none of {', '.join(GRIDS)}")
    results = {}
    for part, grid in GRIDS[name].items():
        if not read:
            _run(grid, work / grid, jobs)
        file = work / grid / "result.json"
        if file.exists():
            results[part] = json.loads(file.read_text(encoding="utf-8"))
            picture = f"{name}-{part.replace('_', '-')}.svg"
            shutil.copy(work / grid / "accuracy.svg", ROOT / "docs" / "images" / picture)
    figures: dict[str, float | None] = {}
    for part, result in results.items():
        figures |= ratios(part, result["details"]["arms"])
    if name == "guide":
        figures |= {f"b32_trainable_share_{r}": B32[r] / B32["base"] for r in ("r8", "r16")}
    first = next(iter(results.values()))
    details = {
        "command": f"python benchmarks/federated_lora.py {name}",
        "inputs": {k: v for r in results.values() for k, v in r["details"]["inputs"].items()},
        "grids": {part: result["details"] for part, result in results.items()},
    }
    made_by = {key: first[key] for key in ("commit", "code")}
    if any(result["code"] != first["code"] for result in results.values()):
        raise SystemExit("these grids were run by different code; run all of them by one")
    path = write_result(RESULTS / f"{name}.json", name, figures, details, made_by)
    Console().print(f"written to {path}")


def ratios(part: str, arms: Mapping[str, Any]) -> dict[str, float | None]:
    """Each arm's accuracy over its references', with 95 % intervals over seeds and images."""
    figures = {}
    for arm, row in arms.items():
        for reference, minus in row["minus"].items():
            key, found = f"{arm}_over_{reference}_{part}", minus["ratio"]
            figures[key] = found["mean"]
            figures |= {f"{key}_{end}": found[end] for end in ("low", "high")}
    return figures


def _run(grid: str, work: Path, jobs: int | None) -> None:
    command = [sys.executable, "-m", "fedclip", "bench", "--work", str(work)]
    command += ["--grid", str(ROOT / "configs" / "bench" / f"{grid}.yaml")]
    command += ["--jobs", str(jobs)] if jobs else []
    ran = subprocess.run(command, cwd=ROOT, check=False)
    if ran.returncode:
        raise SystemExit(ran.returncode)


if __name__ == "__main__":
    typer.run(main)
