"""Writes the job that all peers do: model, starting adapter, data, and the order of the examples.

A workload folder holds all that is drawn, so that no peer draws anything:

    model/               a CLIP with seeded random weights, in the hub's format
    adapter.safetensors  the starting LoRA tensors, named as in `adapter_model.safetensors`
    data.safetensors     pixels uint8 [n, 3, 32, 32], mean and std [3], labels [n],
                         text_features [classes, dim] (L2-normalised), logit_scale [] (a factor),
                         order [rounds, clients, steps, batch]: the examples of every step
    job.json             rounds, clients, steps, batch, LoRA's and the optimizer's settings

The order is the one in which fedclip's engines take the examples of the same clients.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from fedclip import CLIPLoRAWrapper, base_folder, create_clip_model
from fedclip.federated.local_steps import LocalSettings, plan_steps
from fedclip.seeding import seed_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGE = {"clients": 10, "steps": 2, "batch": 32}
SMALL = {"clients": 32, "steps": 2, "batch": 8}

LORA = {"r": 8, "alpha": 16, "targets": ["q_proj", "k_proj", "v_proj", "out_proj"]}
OPTIMIZER = {"learning_rate": 1e-3, "weight_decay": 0.01, "betas": [0.9, 0.999]}
CLASS_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = ["the number {}"]
PROJECTION = 64


@dataclass(frozen=True)
class FedclipJob:
    """The workload as fedclip's engines take it: their arguments under their own names."""

    model: CLIPLoRAWrapper
    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    clients: dict[str, NDArray[np.int64]]
    settings: LocalSettings
    seed: int
    rounds: int


def write_workload(
    folder: Path, *, clients: int, steps: int, batch: int, rounds: int, seed: int
) -> None:
    """Writes a workload folder; the same arguments give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    job = {
        "clients": clients,
        "steps": steps,
        "batch": batch,
        "rounds": rounds,
        "seed": seed,
        "client_ids": [str(client) for client in range(clients)],
        "class_names": CLASS_NAMES,
        "templates": TEMPLATES,
        "lora": LORA,
        "optimizer": OPTIMIZER,
    }
    (folder / "job.json").write_text(json.dumps(job, indent=2) + "\n", encoding="utf-8")
    _write_model(folder / "model", seed)
    model = _wrapped(folder, job)
    save_file(model.get_parameters(), folder / "adapter.safetensors")
    with torch.no_grad():
        fixed = {
            "text_features": model.text_features().clone(),
            "logit_scale": model.clip.logit_scale.exp().clone(),
        }
    pixels, labels = _images(clients * steps * batch, seed)
    data = {
        "pixels": torch.from_numpy(pixels),
        "labels": torch.from_numpy(labels),
        "mean": torch.full((3,), 0.5),
        "std": torch.full((3,), 0.5),
        "order": torch.from_numpy(_order(job)),
    }
    save_file(data | fixed, folder / "data.safetensors")


def open_for_fedclip(folder: Path) -> FedclipJob:
    """Reads a workload folder into what `SequentialEngine` and `BatchedEngine` are made of."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    data = load_file(folder / "data.safetensors")
    model = _wrapped(folder, job)
    model.set_parameters(load_file(folder / "adapter.safetensors"))
    return FedclipJob(
        model=model,
        pixels=data["pixels"].numpy(),
        labels=data["labels"].numpy(),
        clients=_clients(job),
        settings=_settings(job),
        seed=job["seed"],
        rounds=job["rounds"],
    )


def _write_model(folder: Path, seed: int) -> None:
    """The embedded model's sizes, the activation of OpenAI's CLIPs, and random weights."""
    tiny = base_folder("tiny")
    config: Any = CLIPConfig.from_pretrained(tiny)
    config.projection_dim = PROJECTION
    config.vision_config.hidden_act = config.text_config.hidden_act = "quick_gelu"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_for(seed, "model"))
        model = CLIPModel(config)
    model.save_pretrained(folder)
    # fedclip opens the folder as any model, so it needs a tokenizer and the pixels' settings.
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copyfile(tiny / name, folder / name)
    shutil.copyfile(tiny / "preprocessor_config.json", folder / "preprocessor_config.json")


def _wrapped(folder: Path, job: dict) -> CLIPLoRAWrapper:
    config = {
        "model_name": str((folder / "model").resolve()),
        "lora": {
            "r": job["lora"]["r"],
            "lora_alpha": job["lora"]["alpha"],
            "lora_dropout": 0.0,
            "target_modules": {"vision_encoder": job["lora"]["targets"]},
        },
    }
    return create_clip_model(
        config, class_names=job["class_names"], templates=job["templates"], seed=job["seed"]
    )


def _images(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Noise around one pattern per class, so that there is something to learn."""
    rng = np.random.default_rng(seed_for(seed, "images"))
    labels = rng.integers(0, len(CLASS_NAMES), count, dtype=np.int64)
    patterns = rng.uniform(64, 192, (len(CLASS_NAMES), 3, 32, 32))
    noisy = patterns[labels] + rng.normal(0, 32, (count, 3, 32, 32))
    return noisy.clip(0, 255).astype(np.uint8), labels


def _clients(job: dict) -> dict[str, NDArray[np.int64]]:
    """Every client's examples: consecutive ones, the same number for each."""
    size = job["steps"] * job["batch"]
    return {
        client_id: np.arange(row * size, (row + 1) * size, dtype=np.int64)
        for row, client_id in enumerate(job["client_ids"])
    }


def _settings(job: dict) -> LocalSettings:
    return LocalSettings(
        local_epochs=1,
        batch_size=job["batch"],
        optimizer="adamw",
        learning_rate=job["optimizer"]["learning_rate"],
        weight_decay=job["optimizer"]["weight_decay"],
        max_grad_norm=None,
    )


def _order(job: dict) -> NDArray[np.int64]:
    """The examples of every step `[rounds, clients, steps, batch]`, as fedclip's engines draw."""
    settings = _settings(job)
    rounds = []
    for server_round in range(1, job["rounds"] + 1):
        plans = []
        for client_id, indices in _clients(job).items():
            seed = seed_for(job["seed"], "client", server_round, client_id)
            # Without accumulation a step has one micro-batch.
            plans.append([micro[0] for micro in plan_steps(indices, settings, seed)])
        rounds.append(plans)
    return np.array(rounds, dtype=np.int64)
