"""What the tests of the engines share: a small federation, trained by either engine."""

import shutil
from dataclasses import replace

import numpy as np
import torch

from fedclip.device import product_dtype
from fedclip.federated.engines.batched import BatchedEngine
from fedclip.federated.engines.sequential import SequentialEngine
from fedclip.federated.engines.threads import SideBySide
from fedclip.federated.rounds import run_rounds
from fedclip.federated.strategies import FedAvg
from fedclip.models.clip import create_clip_model
from fedclip.models.pretrained import base_folder
from fedclip.models.stacked.clients import StackedClients
from fedclip.models.stacked.prefix_cache import FrozenInputs, PixelInputs
from fedclip.records import RunState
from tests.support.small import SMALL

CPU = torch.device("cpu")
VISION = {"vision_encoder": ["q_proj", "v_proj", "fc1"]}
BOTH = VISION | {"text_encoder": ["k_proj", "out_proj"]}
SIZES = {"a": 23, "b": 40, "c": 9, "d": 40, "e": 1}


def build(
    head="text",
    targets=VISION,
    dropout=0.0,
    dtype=torch.float32,
    last=None,
    name=SMALL,
    checkpointing=False,
    lora=None,
):
    config = {
        "model_name": name,
        "head": head,
        "gradient_checkpointing": checkpointing,
        "lora": {
            "r": 3,
            "lora_alpha": 6,
            "lora_dropout": dropout,
            "target_modules": targets,
            "last_layers": last,
            **(lora or {}),
        },
    }
    names = ["zero", "one", "two", "three"]
    return create_clip_model(config, class_names=names, templates=["{}", "the digit {}"]).to(dtype)


def base_with_quick_gelu(folder):
    """A copy of the embedded model's configuration with the activation of OpenAI's CLIPs."""
    shutil.copytree(base_folder("tiny"), folder / "base")
    path = folder / "base" / "config.json"
    path.write_text(path.read_text().replace('"hidden_act": "gelu"', '"hidden_act": "quick_gelu"'))
    return folder / "base"


def data(sizes, side=32):
    rng = np.random.default_rng(0)
    total = sum(sizes.values())
    pixels = rng.integers(0, 255, (total, 3, side, side), dtype=np.uint8)
    labels = rng.integers(0, 4, total)
    ends = np.cumsum(list(sizes.values()))
    clients = {c: np.arange(e - n, e) for (c, n), e in zip(sizes.items(), ends, strict=True)}
    return pixels, labels, clients


def create(
    kind,
    model,
    settings,
    *,
    sizes=SIZES,
    group_size=5,
    padded=False,
    cached=False,
    static=False,
    device=CPU,
):
    pixels, labels, clients = data(sizes)
    common = (pixels, labels, clients, settings)
    if kind == "sequential":
        return SequentialEngine(model, *common, seed=1, device=device)
    stacked = StackedClients(model, products=product_dtype(settings.precision))
    images = PixelInputs(pixels, device)
    if cached:
        images = FrozenInputs(stacked.frozen, pixels, device=device, dtype=model.dtype)
    engine = BatchedEngine(
        stacked,
        *common,
        images=images,
        group_size=group_size,
        seed=1,
        device=device,
        padded=padded,
        static=static,
    )
    if kind == "side by side":
        return SideBySide(engine, threads=2)
    return engine


def rounds(
    kind,
    settings,
    *,
    count=1,
    group_size=5,
    sizes=SIZES,
    padded=False,
    cached=False,
    static=False,
    ranks=None,
    strategy=None,
    device=CPU,
    on_steps=None,
    **options,
):
    model = build(**options).to(device)
    engine = create(
        kind,
        model,
        settings,
        sizes=sizes,
        group_size=group_size,
        padded=padded,
        cached=cached,
        static=static,
        device=device,
    )
    if ranks:
        train = engine.train
        engine.train = lambda request: train(replace(request, ranks=ranks))
    state = {name: p.detach().cpu().clone() for name, p in model.trainable().items()}
    loop = run_rounds(
        RunState(state),
        engine,
        strategy(model) if strategy else FedAvg(),
        clients=sizes,
        rounds=count,
        clients_per_round=len(sizes),
        seed=1,
        on_steps=on_steps,
        settings=settings,
    )
    return list(loop)[-1]


def difference(one, other):
    """Largest relative Frobenius difference of any tensor that training moved."""
    return max(
        (
            (one.state.shared[n] - other.state.shared[n]).norm()
            / other.state.shared[n].norm().clamp(min=1e-30)
        ).item()
        for n in one.state.shared
    )
