"""Steps of ViT-B/32 against the standard recipe, a serial loop, and the floor of their arithmetic.

LoRA r=8 in both towers, ten classes, AdamW, random weights. The recipe is PEFT on transformers as
they stand, with prompts padded to 77 tokens; the serial loop is the same with prompts trimmed to
the longest, as ours are. The floor is twice the forward pass's FLOP (activations' gradients, no
weights') at the rate of a large matrix product, measured in the same run. On a GPU, where such
small steps are all launches of kernels, there are also 8 clients of 32 images.

    python benchmarks/floor.py      about two minutes on 2 cores
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch
import typer
from torch.nn.functional import cross_entropy, normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_result
from benchmarks.engine_jobs import (
    B32,
    DEVICE,
    PRECISION,
    SUFFIX,
    build,
    engine,
    forward_flops,
    noise,
    product_rate,
    train_round,
    wait,
)
from fedclip.device import autocast
from fedclip.models.text_head import ensemble


class Recipe:
    """What is written by hand: PEFT on transformers' CLIP, both towers in every step."""

    def __init__(self, images: int, length: int | None, name: str = B32) -> None:
        """`length` pads the prompts; None trims them to the longest."""
        self.model = build(name)
        self.model.train()
        self.parameters = list(self.model.trainable().values())
        pixels, labels = noise(self.model, images)
        self.images = self.model.normalised(torch.from_numpy(pixels))
        self.labels = torch.from_numpy(labels).to(DEVICE)
        ids, _ = self.model.text_head.prompt_ids()
        end = int(ids[0, -1])
        if length is not None:
            filler = torch.full((len(ids), length - ids.shape[1]), end)
            ids = torch.cat([ids, filler], dim=1)
        self.ids = ids.to(DEVICE)

    def round(self, clients: int) -> float:
        """Seconds of one step for each client in turn, with a fresh optimizer."""
        size = len(self.labels) // clients
        wait()
        started = time.perf_counter()
        for client in range(clients):
            optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, weight_decay=0.01)
            rows = slice(client * size, (client + 1) * size)
            with autocast(PRECISION, DEVICE):
                scores = self.logits(self.images[rows])
            cross_entropy(scores.float(), self.labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        wait()
        return time.perf_counter() - started

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Scores of a batch against the ten prompts."""
        clip = self.model.clip
        seen = clip.visual_projection(clip.vision_model(pixel_values=images).pooler_output)
        read = clip.text_projection(clip.text_model(input_ids=self.ids).pooler_output)
        texts = ensemble(normalize(read, dim=-1), len(self.model.class_names))
        return clip.logit_scale.exp() * normalize(seen, dim=-1) @ texts.T


def main(repeats: int = 7) -> None:
    """Measures all arms in turn and writes the result file."""
    ours, alone, eight = build(), Recipe(32, 77), Recipe(32, None)
    one, many = engine(ours, 1, 32, 32), engine(ours, 8, 4, 4)
    pairs = {
        "b32_vs_recipe": ("ours", "recipe"),
        "b32_small_batches_vs_serial_peft": ("ours_8x4", "serial_8x4"),
    }
    tokens = eight.ids.shape[1]
    arms = {
        "recipe": lambda: alone.round(1),
        "ours": lambda: train_round(one, ours, 1),
        "serial_8x4": lambda: eight.round(8),
        "ours_8x4": lambda: train_round(many, ours, 8),
    }
    if DEVICE.type == "cuda":
        large, eight_large = engine(ours, 8, 32, 32), Recipe(256, None)
        arms["serial_8x32"] = lambda: eight_large.round(8)
        arms["ours_8x32"] = lambda: train_round(large, ours, 8)
        pairs["b32_8x32_vs_serial_peft"] = ("ours_8x32", "serial_8x32")
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    rates, plain_rates = [], []
    for turn in range(repeats + 1):
        rates.append(product_rate())
        plain_rates.append(product_rate(torch.matmul))
        for name, arm in arms.items():
            taken = arm()
            if turn:  # the first turn warms up
                seconds[name].append(taken)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rate, plain = statistics.median(rates), statistics.median(plain_rates)
    floor = 2 * forward_flops(ours, 32, len(ours.class_names), tokens) / rate
    figures = {name: median[theirs] / median[own] for name, (own, theirs) in pairs.items()}
    figures["b32_step_over_floor"] = median["ours"] / floor
    figures["product_rate_over_matmul"] = rate / plain
    for name, value in {**median, "floor": floor}.items():
        print(f"{name:<18} {value:.3f} s")
    print(f"matrix product {rate / 1e9:.0f} GFLOP/s, by torch.matmul {plain / 1e9:.0f} GFLOP/s")
    for name, value in figures.items():
        print(f"{name:<36} {value:.2f}")
    details = {
        "command": "python benchmarks/floor.py",
        "device": str(DEVICE),
        "precision": PRECISION,
        "seconds": seconds,
        "floor_seconds": floor,
        "matrix_product_flops": rate,
        "matmul_flops": plain,
        "prompt_tokens": tokens,
    }
    write_result(f"floor{SUFFIX}", {k + SUFFIX: v for k, v in figures.items()}, details)


if __name__ == "__main__":
    typer.run(main)
