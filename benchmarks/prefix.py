"""Epochs with adapters in the last layers only: the frozen prefix kept, or computed each time.

ViT-B/32, random weights, LoRA r=8 in the vision tower, batches of 32. Both arms begin the backward
pass at the first adapted layer. The cache is fp32, in memory; its first epoch, which fills it, is
not counted.

    python benchmarks/prefix.py     about two minutes on 2 cores
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_result
from benchmarks.engine_jobs import DEVICE, PRECISION, SUFFIX, VISION, build, engine, train_round
from fedclip.records import TrainRequest

EXAMPLES, BATCH, STEPS = 96, 32, 20


def main(repeats: int = 5) -> None:
    """Measures both depths and writes the result file."""
    figures: dict[str, float] = {}
    details: dict[str, Any] = {"command": "python benchmarks/prefix.py", "device": str(DEVICE)}
    details |= {"precision": PRECISION, "examples": EXAMPLES, "batch_size": BATCH}
    for last, name in ((4, "prefix_cache_speedup"), (2, "prefix_cache_speedup_last2")):
        model = build(targets=VISION, last_layers=last)
        kept = engine(model, 1, EXAMPLES, BATCH, cached=True)
        anew = engine(model, 1, EXAMPLES, BATCH)
        seconds: dict[str, list[float]] = {"kept": [], "anew": []}
        for turn in range(repeats + 1):
            for arm, trainer in (("kept", kept), ("anew", anew)):
                taken = train_round(trainer, model, 1, turn + 1)
                if turn:  # the first epoch fills the cache
                    seconds[arm].append(taken)
        figures[name] = statistics.median(seconds["anew"]) / statistics.median(seconds["kept"])
        losses = _loss_difference(last)
        details[f"last_{last}"] = {"seconds": seconds, "largest_loss_difference": losses}
        print(f"last {last} layers: {figures[name]:.2f} times faster, losses {losses:.1e} apart")
    write_result(f"prefix{SUFFIX}", {k + SUFFIX: v for k, v in figures.items()}, details)


def _loss_difference(last: int) -> float:
    """Largest relative difference of a step's loss over the first steps of both arms."""
    model = build(targets=VISION, last_layers=last)
    arms = [engine(model, 1, 8, 8, cached=cached) for cached in (True, False)]
    states = [model.get_parameters()] * 2
    worst = 0.0
    for step in range(STEPS):  # a round of one step each, so that a report holds the step's loss
        found = []
        for index, trainer in enumerate(arms):
            (cohort,) = trainer.train(TrainRequest(step + 1, ("0",), states[index]))
            states[index] = {name: stacked[0] for name, stacked in cohort.tensors.items()}
            found.append(cohort.reports[0].loss)
        worst = max(worst, abs(found[0] - found[1]) / found[1])
    return worst


if __name__ == "__main__":
    typer.run(main)
