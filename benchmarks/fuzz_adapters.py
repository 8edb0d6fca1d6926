"""Damaged adapter folders, of every kind that is trained, with and without fedclip's notes."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.fuzz_damage import (
    Damage,
    Damaged,
    copied,
    in_json,
    in_place_of,
    in_tensors,
)
from benchmarks.fuzz_runs import workplace
from fedclip.adapters.export import export
from fedclip.errors import FedclipError
from fedclip.models.adapter_folder import NOTES
from fedclip.models.adapter_updates import open_adapter, read_lora
from fedclip.models.clip import CLIPLoRAWrapper, create_clip_model
from fedclip.models.state import adapter_sha256

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"r": 2, "last_layers": 1}},
    "pattern": {"lora": {"r": 2, "last_layers": 1, "rank_pattern": {"q_proj": 4}}},
    "dora": {"lora": {"r": 2, "last_layers": 1, "use_dora": True}},
    "linear": {"head": "linear", "lora": {"r": 2, "last_layers": 1}},
    "probe": {"head": "linear", "lora": {"target_modules": {}}},
    "plain": {"lora": {"r": 2, "last_layers": 1}},  # a PEFT folder, without notes and digests
}
WEIGHTS = "adapter_model.safetensors"
CLASSES = ["cat", "dog", "red car"]
DIGESTS = ("adapter_sha256", "config_sha256", "notes_sha256")


@dataclass(frozen=True)
class Case:
    """A damaged folder of one of ADAPTERS; `signed` if a digest could tell."""

    adapter: str
    folder: Path
    what: str
    door: str
    signed: bool


def make(rng: random.Random, place: Path) -> Case:
    """An adapter folder with one or two of its files damaged."""
    name = rng.choice(list(ADAPTERS))
    folder = copied(saved(name), place / "adapter")
    files = sorted(path.name for path in folder.iterdir() if path.suffix != ".md")
    names = rng.sample(files, rng.choice([1, 1, 1, min(2, len(files))]))
    for file in names:
        path = folder / file
        if rng.random() < 0.06:
            in_place_of(rng, path)
        else:
            damage: Damage = in_json if path.suffix == ".json" else in_tensors
            path.write_bytes(damage(rng, path.read_bytes()))
    if rng.random() < 0.05:  # part of another adapter
        other = saved(rng.choice(list(ADAPTERS)))
        piece = rng.choice(sorted(other.iterdir()))
        if not os.path.lexists(folder / piece.name):
            shutil.copy(piece, folder)
    door = rng.choice(["load"] * 6 + ["open", "lora", "export"])
    return Case(name, folder, f"{name}, {door}: {', '.join(names)}", door, _signed(folder))


def read(case: Case) -> None:
    """Takes an adapter as a command does; its values must be those that were saved."""
    found = DOORS[case.door](case.adapter, case.folder)
    if case.adapter == "plain" and case.door == "load":  # no digest: what the file has is right
        tensors = {name: t.float() for name, t in load_file(case.folder / WEIGHTS).items()}
        if found[0] != adapter_sha256(tensors):
            raise Damaged(f"{case.what} is taken with other values than its file has")
    if case.signed and found != _right(case.door, case.adapter):
        raise Damaged(f"{case.what} is taken with other values")


def _load(name: str, folder: Path) -> Any:
    model = fresh(name)
    before = {k: v.clone() for k, v in model.get_parameters().items()}
    try:
        model.load_adapter(folder)
        return [adapter_sha256(model.get_parameters()), model.class_names, model.templates]
    except FedclipError:
        if adapter_sha256(model.get_parameters()) != adapter_sha256(before):
            raise Damaged("a refused adapter has changed the model") from None
        raise


def _lora(name: str, folder: Path) -> Any:
    found = read_lora(folder)
    flat = {f"{path}.{i}": t for path, pair in found.layers.items() for i, t in enumerate(pair)}
    return [adapter_sha256({**flat, **found.head, **found.magnitudes}), found.notes]


def _open(name: str, folder: Path) -> Any:
    model = open_adapter(folder)
    return [adapter_sha256(model.get_parameters()), model.class_names, model.templates]


def _export(name: str, folder: Path) -> Any:
    target = folder.with_name("exported")
    export(folder, "peft", target)
    return _lora(name, target)


DOORS: dict[str, Callable[[str, Path], Any]] = {
    "load": _load,
    "open": _open,
    "lora": _lora,
    "export": _export,
}


@cache
def _right(door: str, name: str) -> Any:
    return DOORS[door](name, saved(name))


@cache
def saved(name: str) -> Path:
    """The folder of one of ADAPTERS, with values that differ everywhere; made once."""
    model = fresh(name)
    generator = torch.Generator().manual_seed(0)
    model.set_parameters(
        {
            key: value + 0.05 * torch.randn(value.shape, generator=generator)
            for key, value in model.get_parameters().items()
        }
    )
    folder = workplace() / f"adapter-{name}"
    model.save_adapter(folder)
    if name == "plain":
        (folder / NOTES).unlink()
    return folder


def fresh(name: str) -> CLIPLoRAWrapper:
    """A model that the adapter fits."""
    return deepcopy(_host(name))


@cache
def _host(name: str) -> CLIPLoRAWrapper:
    config = {"model_name": "random:tiny"} | ADAPTERS[name]
    return create_clip_model(config, class_names=CLASSES)


def _signed(folder: Path) -> bool:
    """Whether all digests are there still; without them a folder is one of an older version."""
    if not (folder / NOTES).is_file():  # a device would never end
        return False
    try:
        return set(DIGESTS) - {"config_sha256"} <= set(json.loads((folder / NOTES).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
