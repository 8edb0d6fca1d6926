"""Choose the engine of a run, its group size and its prefix cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedclip.catalog import ENGINES
from fedclip.config import Config, EngineConfig
from fedclip.config.lookup import load
from fedclip.data.cache import cache_folder
from fedclip.experiment.context import ONLY, RunContext, Task
from fedclip.experiment.hostile import attacked, poisoned_data
from fedclip.federated.engines.batched import BatchedEngine
from fedclip.federated.engines.memory import choose_group_size, memory_budget
from fedclip.federated.engines.multitask import TaskEngine
from fedclip.federated.engines.sequential import SequentialEngine
from fedclip.federated.engines.sharded import ShardedEngine
from fedclip.federated.engines.threads import on_all_threads
from fedclip.federated.local_steps import LocalSettings
from fedclip.federated.losses import Contrastive, classification
from fedclip.federated.privacy.dp_sgd import DpSgd
from fedclip.federated.rounds import Engine
from fedclip.lora.layer_patterns import check_hits, owners
from fedclip.models.stacked.prefix_cache import FrozenInputs, PixelInputs, frozen_numbers
from fedclip.records import State
from fedclip.reports.listener import Listener

_PREFIX_CACHES = ("off", "memory", "disk")
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def stacks(engine: EngineConfig) -> bool:
    """Whether many clients share one pass; an engine from elsewhere says so by `stacks = True`."""
    row = ENGINES.get(engine.name)
    return row.stacks if row else getattr(load("engines", engine.name), "stacks", False) is True


def settle_engine(context: RunContext, listener: Listener) -> RunContext:
    """Resolve `auto` engine settings (name, group size, prefix cache) and attach model inputs.

    Several tasks have one setting, which suits all of them.
    """
    trained = [path for name in context.model.trainable() for path in owners(name)]
    check_hits("optimizer.rate_pattern", context.config.optimizer.rate_pattern, trained)
    engine, tasks = context.config.engine, context.by_task()
    unstacked = (
        "learning from captions" if any(t.data.captioned for t in tasks.values()) else None,
        context.model.kind.unstacked,
        "fp16, whose loss scale is each client's own," if context.precision == "fp16" else None,
    )
    for what in unstacked:
        if what and stacks(engine):
            listener.message(f"{what} is not stacked: it runs on the sequential engine")
            engine = engine.model_copy(update={"name": "sequential"})
    if stacks(engine):
        augmented = any(task.config.data.augment != "none" for task in tasks.values())
        images = sum(len(task.data.pixels) for task in tasks.values())
        cache = _PREFIX_CACHES.index(_prefix_cache(context, engine, images, augmented, listener))
        sizes = []
        for name, task in tasks.items():
            context.turn_to(name)
            sizes.append(engine.group_size or _group_size(task, engine))
        # Machines may differ: what the first process finds is what all of them do.
        group_size, cache = context.processes.first_numbers([min(sizes), cache])
        engine = engine.model_copy(
            update={"group_size": group_size, "prefix_cache": _PREFIX_CACHES[cache]}
        )
    config = context.config.model_copy(update={"engine": engine})
    inputs = {name: _inputs(context, task, engine) for name, task in context.tasks.items()}
    context = replace(context, config=config, tasks=inputs)
    return replace(context, poisoned=_poisoned(context, engine))


def _poisoned(context: RunContext, engine: EngineConfig) -> Task | None:
    """The task on data that hostile clients have falsified."""
    data = poisoned_data(context)
    if data is None:
        return None
    clean = context.tasks[ONLY]
    if data.pixels is clean.data.pixels:
        return replace(clean, data=data)
    return _inputs(context, Task(data, PixelInputs(data.pixels, context.device)), engine)


def _inputs(context: RunContext, task: Task, engine: EngineConfig) -> Task:
    """The task with the frozen layers' cached output as its images, where that is kept."""
    if not stacks(engine) or engine.prefix_cache == "off":
        return task
    assert context.stacked is not None
    images = FrozenInputs(
        context.stacked.frozen,
        task.data.pixels,
        device=context.device,
        dtype=_DTYPES[engine.prefix_dtype],
        folder=cache_folder() if engine.prefix_cache == "disk" else None,
    )
    return replace(task, images=images)


def _group_size(context: RunContext, engine: EngineConfig) -> int:
    assert context.stacked is not None
    return choose_group_size(
        context.stacked,
        context.model.get_parameters(),
        image_size=context.model.image_size,
        batch_size=context.config.data.batch_size,
        clients=context.clients_per_round,
        memory_gb=engine.memory_gb,
        device=context.device,
        by_example=context.config.privacy.unit == "example",
    )


def _prefix_cache(
    context: RunContext, engine: EngineConfig, images: int, augmented: bool, listener: Listener
) -> str:
    """Where the frozen layers' output is kept; `off` where there is none, or it always differs."""
    stacked = context.stacked
    assert stacked is not None
    if stacked.frozen_layers == 0 or augmented:
        return "off"
    if engine.prefix_cache != "auto":
        return engine.prefix_cache
    numbers = frozen_numbers(stacked.frozen, context.model.image_size, context.device)
    needed = numbers * _DTYPES[engine.prefix_dtype].itemsize * images
    if needed <= memory_budget(engine.memory_gb, context.device):
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


def step_settings(context: RunContext) -> LocalSettings:
    """The settings by which clients' steps are counted; of several tasks those of most steps."""
    found = local_settings(context.config, context.precision)
    own = [task.config.data for task in context.by_task().values()]
    return replace(
        found,
        batch_size=min(data.batch_size for data in own),
        accumulation_steps=min(data.accumulation_steps for data in own),
    )


def create_engine(context: RunContext, private: DpSgd | None = None) -> Engine:
    """The engine that the configuration names, for this process's share of the clients.

    With `private` the clients train by DP-SGD.
    """
    if context.several:

        def turn_to(task: str, shift: State) -> None:
            context.turn_to(task)
            context.shift(shift)

        engines = {name: create_engine(task) for name, task in context.by_task().items()}
        return TaskEngine(engines, context.task_of, turn_to)
    context = context.as_trained()
    common = _common(context) | ({} if private is None else {"private": private})
    engine = attacked(context, load("engines", context.config.engine.name)(context, **common))
    if context.processes.count == 1:
        return engine
    return ShardedEngine(engine, context.processes, context.clients)


def sequential(context: RunContext, **common: Any) -> Engine:
    """The engine of that name."""
    data = context.data
    if not data.captioned:
        return SequentialEngine(context.model, **common, objective=classification)
    if data.pictures is None:
        objective = Contrastive(data.class_names)
    else:  # pictures of several captions: a pair is known by its own number
        pairs = torch.from_numpy(np.stack([data.labels, data.pictures], axis=1))
        objective = Contrastive(data.class_names, pairs)
        common |= {"labels": np.arange(len(data.labels))}
    return SequentialEngine(context.model, **common, objective=objective)


def batched(context: RunContext, **common: Any) -> Engine:
    """The engine of that name, on all threads of a CPU."""
    engine = context.config.engine
    assert context.stacked is not None
    assert engine.group_size is not None  # settle_engine has chosen it
    return on_all_threads(
        BatchedEngine(
            context.stacked,
            images=context.images,
            group_size=engine.group_size,
            padded=context.device.type != "cpu",
            static=context.device.type == "cuda" and engine.graphs == "auto",
            **common,
        )
    )


def _common(context: RunContext) -> dict[str, Any]:
    """What every engine takes, by name."""
    return {
        "pixels": context.data.pixels,
        "labels": context.data.labels,
        "clients": context.training,
        "settings": local_settings(context.config, context.precision),
        "seed": context.config.seed,
        "device": context.device,
    }
