"""Clears a comparison of a later change of code: some of its cells, run again, give what they gave.

    python benchmarks/cleared.py guide digits full:0 r8:1 r16:2

A cell is an arm and a seed. Where each accuracy lies within half the width of its arm's interval
from the one that stands in the file, the file says so, and is stale no longer.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, ROOT
from benchmarks.federated_lora import GRIDS
from fedclip import files
from fedclip.experiment.bench.plan import Cell, Plan, make_plan
from fedclip.experiment.bench.result import present_code
from fedclip.experiment.bench.runner import Finished, ProcessRunner


def run_again(
    plan: Plan, arms: Mapping[str, Any], wanted: list[str], run: Callable[[Cell], Any]
) -> list[dict[str, Any]]:
    """Each cell's accuracy then and now, and how far apart they may be."""
    found = []
    for name in wanted:
        arm, _, number = name.rpartition(":")
        row, seed = arms[arm], int(number)
        values = {key: knob["value"] for key, knob in row["tuning"].items()}
        (cell,) = [c for c in plan.cells(arm, values) if c.seed == seed]
        outcome = run(cell)
        if not isinstance(outcome, Finished):
            raise SystemExit(f"{name}: {outcome.reason}")
        then = next(r["accuracy"] for r in row["runs"] if r["seed"] == seed)
        now = outcome.summary["accuracy"]
        apart = row["accuracy"]["ci95"]
        found.append({"cell": name, "then": then, "now": now, "allowed": apart})
    return found


def main(name: str, part: str, *wanted: str) -> int:
    """Runs the cells; 1 where one of them gives another accuracy."""
    file = RESULTS / f"{name}.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    plan = make_plan(ROOT / "configs" / "bench" / f"{GRIDS[name][part]}.yaml")
    arms = result["details"]["grids"][part]["arms"]
    with tempfile.TemporaryDirectory() as folder:
        cells = run_again(plan, arms, list(wanted), ProcessRunner(plan.config, Path(folder)))
    for cell in cells:
        print(f"{cell['cell']}: {cell['then']:.4f} then, {cell['now']:.4f} now")
    if any(abs(cell["now"] - cell["then"]) > cell["allowed"] for cell in cells):
        print("not cleared: run the comparison again", file=sys.stderr)
        return 1
    result["cleared"] = {**present_code(), "part": part, "cells": cells}
    files.replace_file(file, json.dumps(result, indent=2, ensure_ascii=False).encode() + b"\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
