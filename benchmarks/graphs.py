"""Training steps as CUDA graphs, on a GPU: over their floor, against eager steps and serial PEFT.

CLIP with random weights, LoRA r=8 in both towers, ten classes, AdamW. A step's time is what one
more step adds to a round, so a round's fixed part (states to the GPU and back) is not in it; that
of a whole round of one step is given too. The floor is twice the forward pass's FLOP at the rate
of a product of 2048 x 2048, as in `floor.py`; `_large` at that of a product of 8192 x 8192, which
is higher. The serial loop is PEFT on transformers, prompts trimmed, one client after another; the
recipe is the same with prompts of 77 tokens.

    python benchmarks/graphs.py     about three minutes on an H100
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_result
from benchmarks.engine_jobs import (
    B32,
    DEVICE,
    PRECISION,
    SUFFIX,
    build,
    client_ids,
    engine,
    forward_flops,
    product_rate,
    train_round,
    wait,
)
from benchmarks.floor import Recipe
from fedclip.records import TrainRequest

B16 = B32.replace("patch32", "patch16")
# name: base, clients, batch
SHAPES = {
    "b32_8x32": (B32, 8, 32),
    "b32_8x4": (B32, 8, 4),
    "b32_1x32": (B32, 1, 32),
    "b16_8x32": (B16, 8, 32),
}
STEPS = 6


def main(
    repeats: int = 5,
    profile: Annotated[bool, typer.Option(help="Print the kernels of two shapes.")] = False,
    shapes: Annotated[str, typer.Option(help="Which, by commas.")] = ",".join(SHAPES),
) -> None:
    """Measures shape by shape, the most telling first, and writes the file after each part."""
    rates = {"": product_rate(), "_large": large_rate()}
    print({name: f"{rate / 1e12:.0f} TFLOP/s" for name, rate in rates.items()}, flush=True)
    figures: dict[str, float] = {}
    details: dict[str, Any] = {
        "command": "python benchmarks/graphs.py",
        "device": str(DEVICE),
        "precision": PRECISION,
        "product_flops": rates,
    }

    def part(name: str, measure: Callable[[], tuple[dict[str, float], Any]]) -> None:
        """Whatever fails is told, and does not keep the rest from being measured."""
        started = time.perf_counter()
        try:
            found, details[name] = measure()
        except Exception:
            traceback.print_exc()
            details[name] = traceback.format_exc()
        else:
            figures.update(found)
            for figure, value in found.items():
                print(f"{figure:<40} {value:.4g}", flush=True)
        print(f"  {name}: {time.perf_counter() - started:.0f} s", flush=True)
        write_result(f"graphs{SUFFIX}", {k + SUFFIX: v for k, v in figures.items()}, details)

    for name in shapes.split(","):
        part(name, partial(_shape, name, repeats, rates, profile))
    part("equality", _equality)
    part("flat", lambda: _flat(repeats))

    def serial(name: str) -> tuple[dict[str, float], Any]:
        return _serial(name, details[name]["graphs"]["step"])

    for name in shapes.split(","):
        part(f"{name}_serial", partial(serial, name))


def _shape(
    name: str, repeats: int, rates: dict[str, float], profile: bool
) -> tuple[dict[str, float], Any]:
    """Graphs on and off in turn; memory of each by itself."""
    base, clients, batch = SHAPES[name]
    model = build(base)
    details = {arm: _memory(model, clients, batch, arm == "graphs") for arm in ("eager", "graphs")}
    arms = {
        arm: {
            steps: engine(model, clients, batch * steps, batch, graphs=arm == "graphs")
            for steps in (1, STEPS)
        }
        for arm in details
    }
    for arm, trainers in arms.items():
        details[arm]["rounds"] = {steps: [] for steps in trainers}
        for turn in range(3):  # warm up; the second use of a shape is captured
            for trainer in trainers.values():
                train_round(trainer, model, clients, turn + 1)
    for turn in range(repeats):
        for arm, trainers in arms.items():
            for steps, trainer in trainers.items():
                taken = train_round(trainer, model, clients, turn + 4)
                details[arm]["rounds"][steps].append(taken)
    for own in details.values():
        median = {steps: statistics.median(taken) for steps, taken in own["rounds"].items()}
        own["step"] = (median[STEPS] - median[1]) / (STEPS - 1)
        own["round_of_one_step"] = median[1]
    graphs, eager = details["graphs"], details["eager"]
    static = arms["graphs"][STEPS]._static
    graphs["capture_seconds"] = sum(g.seconds for g in static.graphs)
    graphs["count"] = sum(map(len, static.graphs))
    graphs["replay"], graphs["launch"] = _replay(static) if graphs["count"] else (1.0, 1.0)
    if profile:
        print(_kernels(arms["graphs"][STEPS], model, clients))
    flops = 2 * forward_flops(model, clients * batch, 10 * clients, _prompt_tokens(model))
    found = {f"{name}_step_over_floor{k}": graphs["step"] * r / flops for k, r in rates.items()}
    found |= {
        f"{name}_round_over_floor": graphs["round_of_one_step"] * rates[""] / flops,
        f"{name}_eager_over_graphs": eager["step"] / graphs["step"],
        f"{name}_memory_over_eager": graphs["peak_allocated"] / eager["peak_allocated"],
        f"{name}_reserved_over_eager": graphs["peak_reserved"] / eager["peak_reserved"],
        f"{name}_capture_seconds": graphs["capture_seconds"],
        f"{name}_launch_seconds": graphs["launch"],
    }
    return found, details | {"floor": {k: flops / rate for k, rate in rates.items()}}


def _memory(model: Any, clients: int, batch: int, graphs: bool) -> dict[str, Any]:
    """Bytes at most in use over three rounds of one step, by one engine alone."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer = engine(model, clients, batch, batch, graphs=graphs)
    for turn in range(3):
        train_round(trainer, model, clients, turn + 1)
    return {
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
    }


def _replay(static: Any) -> tuple[float, float]:
    """Seconds of a replay on the GPU, and what the host spends to launch one on an idle GPU."""
    (room,) = static._rooms.values()
    graph = next(iter(room.graphs._graphs.values()))
    replays, launches = [], []
    for _ in range(20):
        wait()
        started = time.perf_counter()
        graph.replay()
        launches.append(time.perf_counter() - started)
        wait()
        replays.append(time.perf_counter() - started)
    return statistics.median(replays), statistics.median(launches)


def _kernels(trainer: Any, model: Any, clients: int) -> str:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        train_round(trainer, model, clients)
    table = profiler.key_averages()
    count = sum(event.count for event in table)
    return f"{count} kernels\n" + table.table(
        sort_by="self_cuda_time_total", row_limit=32, max_name_column_width=70
    )


def _equality() -> tuple[dict[str, float], Any]:
    """Largest relative distance of graphs' updates from eager ones, SGD, two steps."""
    model = build(B32)
    state = {name: p.detach().cpu() for name, p in model.trainable().items()}
    request = TrainRequest(1, client_ids(4), state)
    updates = []
    for graphs in (True, False):
        trainer = engine(model, 4, 64, 32, graphs=graphs, optimizer="sgd")
        (cohort,) = trainer.train(request)
        if graphs:  # the second round is replayed from the first step on
            (again,) = trainer.train(request)
            same = all(torch.equal(t, cohort.tensors[n]) for n, t in again.tensors.items())
        updates.append({n: t - state[n] for n, t in cohort.tensors.items() if "lora_B" in n})
    ours, theirs = updates
    apart = max(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in ours)
    return {"update_difference": apart, "replayed_is_first_round": float(same)}, {}


def _flat(repeats: int) -> tuple[dict[str, float], Any]:
    """Time per client of a round of 1,000 over one of 100, groups of 50, the embedded model."""
    model = build("random:tiny")
    sizes = (100, 1000)
    trainers = {count: engine(model, count, 8, 8, group_size=50) for count in sizes}
    seconds: dict[int, list[float]] = {count: [] for count in sizes}
    for turn in range(repeats + 3):
        for count, trainer in trainers.items():
            taken = train_round(trainer, model, count, turn + 1) / count
            if turn >= 3:
                seconds[count].append(taken)
    small, large = (statistics.median(seconds[count]) for count in sizes)
    return {"time_per_client_1000_over_100": large / small}, seconds


def _serial(name: str, step: float) -> tuple[dict[str, float], Any]:
    """The serial loop over PEFT, and for one client the recipe."""
    base, clients, batch = SHAPES[name]
    found, details = {}, {}
    lengths = {"serial_peft": None} | ({"recipe": 77} if clients == 1 else {})
    for what, length in lengths.items():
        arm = Recipe(clients * batch, length, base)
        seconds = [arm.round(clients) for _ in range(5)][2:]
        details[what] = seconds
        found[f"{name}_vs_{what}"] = statistics.median(seconds) / step
    return found, details


def _prompt_tokens(model: Any) -> int:
    return int(model.text_head.prompt_ids()[0].shape[1])


def large_rate() -> float:
    """FLOP/s of a product of 8192 x 8192 in the run's precision, the median of ten."""
    dtype = torch.bfloat16 if PRECISION == "bf16" else torch.float32
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        wait()
        started = time.perf_counter()
        torch.matmul(a, b)
        wait()
        seconds.append(time.perf_counter() - started)
    return 2 * 8192**3 / statistics.median(seconds[3:])


if __name__ == "__main__":
    typer.run(main)
