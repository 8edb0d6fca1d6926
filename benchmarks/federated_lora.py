"""The comparisons of federated LoRA: the guide's table, the strategies, and ranks.

    python benchmarks/federated_lora.py guide         about half an hour on 2 cores
    python benchmarks/federated_lora.py strategies    about an hour and a half
    python benchmarks/federated_lora.py ranks         about half an hour
    python benchmarks/federated_lora.py ranks-projection    about ten minutes

Each runs grids of `configs/bench/` by `fedclip bench`, which goes on from where it was stopped, and
writes one result file. `docs/explanation-strategies.md` shows them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, write_result
from fedclip.experiment.bench.comparisons import interval

DATA = ("digits", "fashion_mnist", "icons")
# Parameters of ViT-B/32 and of LoRA on q, k, v, out of both towers, from `fedclip info`.
B32 = {"base": 151_277_313, "r8": 983_040, "r16": 1_966_080}
MIXED = {"icons": "ranks", "fashion_mnist": "ranks_fashion_mnist"}
ENDS = ("local", "centralised")
app = typer.Typer(help=__doc__)
Jobs = Annotated[int | None, typer.Option("--jobs", "-j", help="Runs at a time.")]


@app.command()
def guide(jobs: Jobs = None) -> None:
    """Full fine-tuning against LoRA of three ranks, on three data sets."""
    grids = {data: _grid(f"guide_{data}", jobs) for data in DATA}
    figures: dict[str, float] = {}
    for data, grid in grids.items():
        arms = grid["arms"]
        for rank in ("r4", "r8", "r16"):
            ratio = arms[rank]["minus"]["full"]["ratio"]
            figures[f"{rank}_over_full_{data}"] = ratio["mean"]
            figures |= {f"{rank}_over_full_{data}_{end}": ratio[end] for end in ("low", "high")}
    figures["b32_trainable_share_r8"] = B32["r8"] / B32["base"]
    figures["b32_trainable_share_r16"] = B32["r16"] / B32["base"]
    _write("guide", figures, {"grids": grids})


@app.command()
def strategies(jobs: Jobs = None) -> None:
    """All algorithms on icons, between local training and centralised."""
    grid = _grid("strategies", jobs)
    arms = grid["arms"]
    contenders = [arm for arm in arms if arm not in ENDS]
    best = max(contenders, key=lambda arm: arms[arm]["accuracy"]["mean"])
    figures = {f"accuracy_{arm}": row["accuracy"]["mean"] for arm, row in arms.items()}
    differences = {}
    for reference in ("centralised", "fedit"):
        found = _difference(arms[best], arms[reference])
        differences[reference] = found
        figures[f"best_minus_{reference}_icons"] = found["mean"]
    _write("strategies", figures, {"best": best, "best_minus": differences, "grid": grid})


@app.command()
def ranks(jobs: Jobs = None) -> None:
    """Clients of different ranks on icons and clothing photos, and dynamic ranks on the latter."""
    mixed = {data: _grid(name, jobs) for data, name in MIXED.items()}
    dynamic = _grid("dynamic_ranks", jobs)
    figures = {
        f"{arm}_minus_rank_4_{data}": _difference(row, grid["arms"]["rank_4"])["mean"]
        for data, grid in mixed.items()
        for arm, row in grid["arms"].items()
        if arm != "rank_4"
    }
    arms = dynamic["arms"]
    figures["dynamic_rank_minus_r8"] = _difference(arms["dynamic"], arms["rank_8"])["mean"]
    figures["dynamic_rank_bytes_saved"] = (
        1 - arms["dynamic"]["bytes_total"] / arms["rank_8"]["bytes_total"]
    )
    grids = {f"mixed_{data}": grid for data, grid in mixed.items()}
    _write("ranks", figures, {**grids, "dynamic": dynamic})


@app.command()
def ranks_projection(jobs: Jobs = None) -> None:
    """Clients of different ranks where the rank is the limit: the projection alone is adapted."""
    grid = _grid("ranks_projection", jobs)
    figures, differences = {}, {}
    for arm, row in grid["arms"].items():
        if arm != "rank_4":
            differences[arm] = _difference(row, grid["arms"]["rank_4"])
            figures[f"{arm}_minus_rank_4_projection"] = differences[arm]["mean"]
    _write("ranks-projection", figures, {"minus_rank_4": differences, "grid": grid})


def _grid(name: str, jobs: int | None) -> dict[str, Any]:
    """Runs what is missing of a grid, and gives the details of its result."""
    work = ROOT / "runs" / "bench" / name
    command = [sys.executable, "-m", "fedclip", "bench", "--grid"]
    command += [str(ROOT / "configs" / "bench" / f"{name}.yaml"), "--work", str(work)]
    command += ["--jobs", str(jobs)] if jobs else []
    ran = subprocess.run(command, cwd=ROOT, check=False)
    if ran.returncode:
        raise SystemExit(ran.returncode)
    found: dict[str, Any] = json.loads((work / "result.json").read_text())["details"]
    return found


def _difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of one arm minus another's, seed by seed: runs of a seed share their test images."""
    theirs = {run["seed"]: run["accuracy"] for run in other["runs"]}
    pairs = [run["accuracy"] - theirs[run["seed"]] for run in one["runs"]]
    found = interval(pairs)
    return {"mean": found.mean, "ci95": found.half, "by_seed": pairs}


def _write(name: str, figures: dict[str, float], details: dict[str, Any]) -> None:
    command = f"python benchmarks/federated_lora.py {name}"
    path = write_result(name.replace("-", "_"), figures, {"command": command, **details})
    Console().print(f"written to {path}")


if __name__ == "__main__":
    app()
