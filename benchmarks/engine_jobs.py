"""Small jobs for the engines' benchmarks: a model with random weights, noise for images."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedclip import CLIPLoRAWrapper, create_clip_model
from fedclip.device import keep_freed_memory, product_dtype, resolve_device, resolve_precision
from fedclip.federated.engines.batched import BatchedEngine
from fedclip.federated.engines.sequential import SequentialEngine
from fedclip.federated.engines.threads import on_all_threads
from fedclip.federated.local_steps import LocalSettings
from fedclip.models.stacked.clients import StackedClients
from fedclip.models.stacked.frozen_matmul import times_transposed
from fedclip.models.stacked.prefix_cache import FrozenInputs, PixelInputs
from fedclip.records import TrainRequest

keep_freed_memory()  # as the command line does

B32 = "random:openai/clip-vit-base-patch32"
QKVO = ["q_proj", "k_proj", "v_proj", "out_proj"]
VISION = {"vision_encoder": QKVO}
BOTH = VISION | {"text_encoder": QKVO}
CLASSES = ["cat", "dog", "car", "tree", "boat", "plane", "bird", "horse", "truck", "frog"]
# A GPU where there is one, in the format that it is fastest in.
DEVICE = resolve_device("auto")
PRECISION = resolve_precision("auto", DEVICE)
# Ends a result file's name and its figures': `BENCHMARK_SUFFIX=_zen4` for a second machine's.
SUFFIX = os.environ.get("BENCHMARK_SUFFIX", "_gpu" if DEVICE.type == "cuda" else "")


def build(
    name: str = B32,
    targets: Mapping[str, Sequence[str]] = BOTH,
    *,
    full: bool = False,
    r: int = 8,
    last_layers: int | None = None,
    checkpointing: bool = False,
) -> CLIPLoRAWrapper:
    """A model of ten classes on the device."""
    lora = {
        "enabled": not full,
        "r": r,
        "lora_dropout": 0.0,
        "target_modules": dict(targets),
        "last_layers": last_layers,
    }
    config = {"model_name": name, "gradient_checkpointing": checkpointing, "lora": lora}
    return create_clip_model(config, class_names=CLASSES).to(DEVICE)


def noise(model: CLIPLoRAWrapper, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images `[count, 3, size, size]` and labels `[count]`."""
    rng = np.random.default_rng(0)
    shape = (count, 3, model.image_size, model.image_size)
    return rng.integers(0, 256, shape, dtype=np.uint8), rng.integers(0, 10, count)


def client_ids(clients: int) -> tuple[str, ...]:
    """Names of so many clients."""
    return tuple(str(client) for client in range(clients))


def engine(
    model: CLIPLoRAWrapper,
    clients: int,
    examples: int,
    batch_size: int,
    *,
    group_size: int | None = None,
    cached: bool = False,
    sequential: bool = False,
    owned: Mapping[str, NDArray[np.int64]] | None = None,
    graphs: bool = True,
    optimizer: str = "adamw",
) -> Any:
    """An engine for clients of equally many examples; learning rate 1e-3, no clipping.

    On CUDA its steps are graphs, unless `graphs` says no.

    `owned` says who has which of all clients' examples, by default each its own.
    """
    pixels, labels = noise(model, clients * examples)
    own = {
        c: np.arange(i * examples, (i + 1) * examples) for i, c in enumerate(client_ids(clients))
    }
    owned = owned or own
    settings = LocalSettings(
        batch_size=batch_size, max_grad_norm=None, precision=PRECISION, optimizer=optimizer
    )
    common: Any = {"seed": 0, "device": DEVICE}
    if sequential:
        return SequentialEngine(model, pixels, labels, owned, settings, **common)
    stacked = StackedClients(model, products=product_dtype(PRECISION))
    inputs: Any = PixelInputs(pixels, DEVICE)
    if cached:
        inputs = FrozenInputs(stacked.frozen, pixels, device=DEVICE)
    return on_all_threads(
        BatchedEngine(
            stacked,
            pixels,
            labels,
            owned,
            settings,
            images=inputs,
            group_size=group_size or clients,
            padded=DEVICE.type != "cpu",
            static=graphs and DEVICE.type == "cuda",
            **common,
        )
    )


def train_round(engine: Any, model: CLIPLoRAWrapper, clients: int, server_round: int = 1) -> float:
    """Seconds of a round's local training; the updates are dropped."""
    state = {name: p.detach().cpu() for name, p in model.trainable().items()}
    request = TrainRequest(server_round, client_ids(clients), state)
    wait()
    started = time.perf_counter()
    for _ in engine.train(request):
        pass
    wait()
    return time.perf_counter() - started


def wait() -> None:
    """Until the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def product_rate(product: Callable[[Tensor, Tensor], Tensor] = times_transposed) -> float:
    """FLOP/s of a matrix product of 2048 x 2048 in the precision of the run, best of ten.

    By default it is the engine's own way to multiply.
    """
    dtype = torch.bfloat16 if PRECISION == "bf16" else torch.float32
    a = torch.randn(2048, 2048, device=DEVICE, dtype=dtype)
    seconds = []
    for _ in range(10):
        wait()
        started = time.perf_counter()
        product(a, a)
        wait()
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(seconds)


def forward_flops(model: CLIPLoRAWrapper, images: int, prompts: int, tokens: int) -> float:
    """FLOP of a forward pass of both towers, all positions, without adapters."""
    clip = model.clip
    config: Any = clip.config
    vision, text = config.vision_config, config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    image = _encoder_flops(vision, patches + 1)
    image += 2 * patches * 3 * vision.patch_size**2 * vision.hidden_size
    return images * image + prompts * _encoder_flops(text, tokens)


def _encoder_flops(config: Any, tokens: int) -> float:
    width, wide = config.hidden_size, config.intermediate_size
    layer = 2 * tokens * (4 * width**2 + 2 * width * wide) + 4 * tokens**2 * width
    return config.num_hidden_layers * layer
