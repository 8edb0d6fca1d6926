"""Which engine carries a run out, with how many clients at once, and on which inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedclip.catalog import ENGINES, load
from fedclip.config import Config, EngineConfig
from fedclip.data.cache import cache_folder
from fedclip.experiment.context import Parts, Shared, TaskParts
from fedclip.federated.client import LocalSettings
from fedclip.federated.engines.batched import BatchedEngine
from fedclip.federated.engines.memory import choose_group_size, memory_budget
from fedclip.federated.engines.multitask import TaskEngine
from fedclip.federated.engines.sequential import SequentialEngine
from fedclip.federated.engines.sharded import ShardedEngine
from fedclip.federated.engines.threads import on_all_threads
from fedclip.federated.losses import Contrastive, classification
from fedclip.federated.privacy.dp_sgd import DpSgd
from fedclip.federated.rounds import Engine
from fedclip.lora.layer_patterns import check_hits, owners
from fedclip.models.stacked.prefix_cache import FrozenInputs, frozen_numbers
from fedclip.records import State
from fedclip.reports.listener import Listener

_PREFIX_CACHES = ("off", "memory", "disk")
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def stacks(engine: EngineConfig) -> bool:
    """Whether many clients share one pass; an engine from elsewhere says so by `stacks = True`."""
    row = ENGINES.get(engine.name)
    return row.stacks if row else getattr(load("engines", engine.name), "stacks", False) is True


def settle_engine(parts: Parts, listener: Listener) -> Parts:
    """The parts with what `auto` and empty keys of the engine stand for, and its inputs."""
    return _settled(parts, [parts], listener)[0]


def settle_task_engines(parts: TaskParts, listener: Listener) -> TaskParts:
    """The same for the tasks of a run: one setting, which suits all of them."""
    names, tasks = list(parts.tasks), list(parts.tasks.values())
    tasks = _settled(parts, tasks, listener, turn_to=lambda i: parts.model.set_task(names[i]))
    config = parts.config.model_copy(update={"engine": tasks[0].config.engine})
    return replace(parts, config=config, tasks=dict(zip(names, tasks, strict=True)))


def _settled(
    parts: Shared,
    tasks: list[Parts],
    listener: Listener,
    turn_to: Callable[[int], None] = lambda index: None,
) -> list[Parts]:
    """The tasks with the engine's settings filled in; `turn_to` sets one of them in the model."""
    trained = [path for name in parts.model.trainable() for path in owners(name)]
    check_hits("optimizer.rate_pattern", parts.config.optimizer.rate_pattern, trained)
    engine = parts.config.engine
    unstacked = (
        "learning from captions" if any(task.data.captioned for task in tasks) else None,
        parts.model.kind.unstacked,
        "fp16, whose loss scale is each client's own," if parts.precision == "fp16" else None,
    )
    for what in unstacked:
        if what and stacks(engine):
            listener.message(f"{what} is not stacked: it runs on the sequential engine")
            engine = engine.model_copy(update={"name": "sequential"})
    if stacks(engine):
        augmented = any(task.config.data.augment != "none" for task in tasks)
        images = sum(len(task.data.pixels) for task in tasks)
        cache = _PREFIX_CACHES.index(_prefix_cache(parts, engine, images, augmented, listener))
        sizes = []
        for index, task in enumerate(tasks):
            turn_to(index)
            sizes.append(engine.group_size or _group_size(task, engine))
        # Machines may differ: what the first process finds is what all of them do.
        group_size, cache = parts.processes.first_numbers([min(sizes), cache])
        engine = engine.model_copy(
            update={"group_size": group_size, "prefix_cache": _PREFIX_CACHES[cache]}
        )
    return [_with_engine(task, engine) for task in tasks]


def _with_engine(parts: Parts, engine: EngineConfig) -> Parts:
    parts = replace(parts, config=parts.config.model_copy(update={"engine": engine}))
    if stacks(engine) and engine.prefix_cache != "off":
        assert parts.stacked is not None
        inputs = FrozenInputs(
            parts.stacked.frozen,
            parts.data.pixels,
            device=parts.device,
            dtype=_DTYPES[engine.prefix_dtype],
            folder=cache_folder() if engine.prefix_cache == "disk" else None,
        )
        parts = replace(parts, images=inputs)
    return parts


def _group_size(parts: Parts, engine: EngineConfig) -> int:
    assert parts.stacked is not None
    return choose_group_size(
        parts.stacked,
        parts.model.get_parameters(),
        image_size=parts.model.image_size,
        batch_size=parts.config.data.batch_size,
        clients=parts.clients_per_round,
        memory_gb=engine.memory_gb,
        device=parts.device,
        by_example=parts.config.privacy.unit == "example",
    )


def _prefix_cache(
    parts: Shared, engine: EngineConfig, images: int, augmented: bool, listener: Listener
) -> str:
    """Where the frozen layers' output is kept; `off` where there is none, or it always differs."""
    stacked = parts.stacked
    assert stacked is not None
    if stacked.frozen_layers == 0 or augmented:
        return "off"
    if engine.prefix_cache != "auto":
        return engine.prefix_cache
    numbers = frozen_numbers(stacked.frozen, parts.model.image_size, parts.device)
    needed = numbers * _DTYPES[engine.prefix_dtype].itemsize * images
    if needed <= memory_budget(engine.memory_gb, parts.device):
        return "memory"
    listener.message(
        f"the frozen layers' output would take {needed / 1e9:.1f} GB and is computed again each "
        "time; engine.prefix_cache: disk keeps it in a file, engine.prefix_dtype: fp16 halves it"
    )
    return "off"


def local_settings(config: Config, precision: str) -> LocalSettings:
    """How the configuration asks every client to train."""
    return LocalSettings(
        local_epochs=config.client.local_epochs,
        batch_size=config.data.batch_size,
        accumulation_steps=config.data.accumulation_steps,
        optimizer=config.optimizer.name,
        learning_rate=config.client.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.optimizer.max_grad_norm,
        schedule=config.optimizer.schedule,
        proximal_mu=config.client.proximal_mu,
        precision=precision,
        augment=config.data.augment,
        rate_pattern=config.optimizer.rate_pattern,
        smallest_batch=1 if config.task == "classification" else 2,  # one pair teaches nothing
    )


def step_settings(parts: Parts | TaskParts) -> LocalSettings:
    """The settings by which clients' steps are counted; of several tasks those of most steps."""
    found = local_settings(parts.config, parts.precision)
    tasks = parts.tasks.values() if isinstance(parts, TaskParts) else (parts,)
    own = [task.config.data for task in tasks]
    return replace(
        found,
        batch_size=min(data.batch_size for data in own),
        accumulation_steps=min(data.accumulation_steps for data in own),
    )


def create_engine(parts: Parts | TaskParts, private: DpSgd | None = None) -> Engine:
    """The engine that the configuration names, for this process's share of the clients.

    With `private` the clients train by DP-SGD.
    """
    if isinstance(parts, TaskParts):

        def turn_to(task: str, shift: State) -> None:
            parts.model.set_task(task)
            parts.shift(shift)

        engines = {name: create_engine(task) for name, task in parts.tasks.items()}
        return TaskEngine(engines, parts.task_of, turn_to)
    common = _common(parts) | ({} if private is None else {"private": private})
    engine = load("engines", parts.config.engine.name)(parts, **common)
    if parts.processes.count == 1:
        return engine
    return ShardedEngine(engine, parts.processes, parts.clients)


def sequential(parts: Parts, **common: Any) -> Engine:
    """The engine of that name."""
    data = parts.data
    if not data.captioned:
        return SequentialEngine(parts.model, **common, objective=classification)
    if data.pictures is None:
        objective = Contrastive(data.class_names)
    else:  # pictures of several captions: a pair is known by its own number
        pairs = torch.from_numpy(np.stack([data.labels, data.pictures], axis=1))
        objective = Contrastive(data.class_names, pairs)
        common |= {"labels": np.arange(len(data.labels))}
    return SequentialEngine(parts.model, **common, objective=objective)


def batched(parts: Parts, **common: Any) -> Engine:
    """The engine of that name, on all threads of a CPU."""
    engine = parts.config.engine
    assert parts.stacked is not None
    assert engine.group_size is not None  # settle_engine has chosen it
    return on_all_threads(
        BatchedEngine(
            parts.stacked,
            images=parts.images,
            group_size=engine.group_size,
            padded=parts.device.type != "cpu",
            static=parts.device.type == "cuda" and engine.graphs == "auto",
            **common,
        )
    )


def _common(parts: Parts) -> dict[str, Any]:
    """What every engine takes, by name."""
    return {
        "pixels": parts.data.pixels,
        "labels": parts.data.labels,
        "clients": parts.training,
        "settings": local_settings(parts.config, parts.precision),
        "seed": parts.config.seed,
        "device": parts.device,
    }
