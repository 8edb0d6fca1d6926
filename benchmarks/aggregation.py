"""How long a server takes to combine the updates of 100 clients, and how exactly it truncates.

OMP_NUM_THREADS=2 python benchmarks/aggregation.py

ViT-B/32 with LoRA of rank 8 on q, k, v and out of both towers: 48 layers of 768 x 768 and 48 of
512 x 512, float32. "flat": factors of all clients independent and random, the hardest case for a
truncated solver, as neighbouring singular values differ by a percent or less. "shared": clients
agree on a part and differ in the rest, as after training from a common start.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_result
from fedclip.lora import aggregate as algebra
from fedclip.lora.aggregate import StackedLora

CLIENTS, RANK, SCALING = 100, 8, 2.0
SIDES = [768] * 48 + [512] * 48
AGREEMENT = {"flat": 0.0, "shared": 0.5}
REPEATS = 3


def layer(side: int, seed: int, kind: str) -> StackedLora:
    """One layer's updates."""
    generator = torch.Generator().manual_seed(seed)
    share = AGREEMENT[kind]

    def draw(*shape: int) -> torch.Tensor:
        own = torch.randn(CLIENTS, *shape, generator=generator)
        return share * torch.randn(shape, generator=generator) + (1 - share) * own

    weights = torch.randint(50, 500, (CLIENTS,), generator=generator)
    a, b = draw(RANK, side) / side**0.5, 0.02 * draw(side, RANK)
    return StackedLora(a, b, weights, torch.full((CLIENTS,), SCALING))


def flora(x: StackedLora, seed: int) -> None:
    """Stack, and merge into a weight."""
    algebra.stack(x).product()


def fedex(x: StackedLora, seed: int) -> None:
    """The mean of the factors, the residual, and the residual dense, as it goes into the weight."""
    algebra.mean_of_factors(x, scaling=SCALING)
    algebra.residual(x, scaling=SCALING).product()


def flexlora(x: StackedLora, seed: int, solver: str = "auto") -> algebra.Factors:
    """The nearest adapter of rank 8."""
    generator = torch.Generator().manual_seed(seed)
    return algebra.truncated_mean(
        x,
        RANK,
        scaling=SCALING,
        solver=solver,  # type: ignore[arg-type]
        generator=generator,
    )


def seconds(method: Callable[[StackedLora, int], Any], kind: str) -> list[float]:
    """Seconds for all layers together, by repeat; drawing the updates is not counted."""
    found = [0.0] * REPEATS
    for number, side in enumerate(SIDES):
        x = layer(side, number, kind)
        for repeat in range(REPEATS):
            started = time.perf_counter()
            method(x, number)
            found[repeat] += time.perf_counter() - started
    return found


def accuracy(kind: str) -> dict[str, float]:
    """Distance of truncated products from the SVD in float64, relative, the largest of all layers.

    "float32_svd" is that of a whole SVD in float32; "smallest_gap" is sigma_8 - sigma_9 in units
    of sigma_1.
    """
    worst = {"truncated": 0.0, "float32_svd": 0.0, "excess_error": 0.0, "smallest_gap": 1.0}
    for number, side in enumerate(SIDES):
        x = layer(side, number, kind)
        exact = StackedLora(x.a.double(), x.b.double(), x.weights, x.scalings)
        dense = algebra.stack(exact).product()
        u, s, vh = torch.linalg.svd(dense)
        best = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
        quick, whole = (
            SCALING * f.b.double() @ f.a.double()
            for f in (flexlora(x, number), flexlora(x, number, "exact"))
        )
        errors = {
            "truncated": (quick - best).norm() / best.norm(),
            "float32_svd": (whole - best).norm() / best.norm(),
            "excess_error": (dense - quick).norm() / (dense - best).norm() - 1,
        }
        worst |= {key: max(worst[key], float(value)) for key, value in errors.items()}
        worst["smallest_gap"] = min(worst["smallest_gap"], float((s[RANK - 1] - s[RANK]) / s[0]))
    return worst


def main() -> None:
    """Times the three aggregations on both kinds of updates and writes the slowest."""
    methods: dict[str, Callable[..., Any]] = {"flora": flora, "fedex": fedex, "flexlora": flexlora}
    times = {
        f"{name}_{kind}": seconds(method, kind)
        for kind in AGREEMENT
        for name, method in methods.items()
    }
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{len(SIDES)} layers, {CLIENTS} clients, rank {RANK}, {torch.get_num_threads()} threads")
    for name, value in medians.items():
        print(f"{name:16} {value:6.2f} s")
    errors = {kind: accuracy(kind) for kind in AGREEMENT}
    for kind, worst in errors.items():
        print(kind, ", ".join(f"{key} {value:.1e}" for key, value in worst.items()))
    details = {
        "command": "OMP_NUM_THREADS=2 python benchmarks/aggregation.py",
        "threads": torch.get_num_threads(),
        "seconds": times,
        "accuracy": errors,
    }
    write_result("aggregation", {"aggregation_seconds_max": max(medians.values())}, details)


if __name__ == "__main__":
    main()
