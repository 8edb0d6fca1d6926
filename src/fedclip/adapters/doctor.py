"""What a configuration will take on this machine, before its run is begun."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedclip.adapters.inspect import config_facts
from fedclip.config import Config
from fedclip.data.federated_data import FederatedData
from fedclip.experiment.build import build, with_absolute_paths
from fedclip.experiment.class_coverage import check_measurable
from fedclip.experiment.context import ONLY, RunContext
from fedclip.experiment.forecast import Forecast, forecast, free_memory
from fedclip.experiment.privacy import epsilon_at_end
from fedclip.experiment.privacy_checks import check_privacy
from fedclip.experiment.strategy import choose_strategy
from fedclip.experiment.survey import data_facts
from fedclip.lora.names import layers_in
from fedclip.reports.listener import Listener
from fedclip.reports.trackers.tracking import tracker_classes

_FILES = 2e6  # bytes of a run folder beside its tensors


def examine(config: Config, listener: Listener, runs: Path = Path()) -> dict[str, Any]:
    """Build a run without beginning it, measure a few steps, and say what all of it will take.

    Sizes are bytes, times seconds. `problems` says what does not fit, and what to change; `data`
    is a list, an item for each task. The run's folder will be below `runs`.
    """
    started = time.perf_counter()
    tracker_classes(config)
    context = build(with_absolute_paths(config), listener)
    strategy = choose_strategy(context)
    check_measurable(context, strategy.personal)
    check_privacy(context, choose_strategy)
    loading = time.perf_counter() - started
    listener.message("measuring a few steps")
    found = forecast(context)
    facts = config_facts(context.config, context.model)
    layers = layers_in(context.model.trainable())
    facts |= {"adapted_layers": len(layers), "engine": context.config.engine.name}
    facts |= {"device": str(context.device), "precision": context.precision}
    facts |= _forecast_facts(found, loading)
    facts |= {"disk_bytes": _disk(context, strategy.personal)}
    facts |= {"free_memory_bytes": free_memory(context.device)}
    facts |= {"free_disk_bytes": shutil.disk_usage(_existing(runs)).free}
    if (epsilon := epsilon_at_end(context)) is not None:
        facts["epsilon"] = epsilon
    facts["problems"] = list(_problems(facts, context))
    facts["data"] = [_data(name, task.data) for name, task in context.tasks.items()]
    return facts


def _data(task: str, data: FederatedData) -> dict[str, Any]:
    """What the survey says of the data, and each site's training examples by class."""
    names, counts = data.training_table()
    return data_facts("" if task == ONLY else task, data) | {
        "class_names": list(names),
        "training": counts,
    }


def _forecast_facts(found: Forecast, loading: float) -> dict[str, Any]:
    return {
        "loading_seconds": loading,
        "round_seconds": found.round_seconds,
        "evaluation_seconds": found.evaluation_seconds,
        "evaluations": found.evaluations,
        "run_seconds": loading + found.rounds_seconds,
        "peak_memory_bytes": found.peak_bytes,
    }


def _disk(context: RunContext, personal: bool) -> int:
    """Bytes of the run folder: two checkpoints, and adapters, each client's where it has one."""
    one = sum(tensor.nbytes for tensor in context.model.get_parameters().values())
    owners = 1 + len(context.clients) * personal
    kept = 2 if context.config.evaluation.keep_best else 1
    return int(one * owners * kept * 3 + _FILES)


def _existing(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _problems(facts: dict[str, Any], context: RunContext) -> Iterator[str]:
    """What does not fit this machine, with what may help."""
    gigabytes = {key: facts[f"{key}_bytes"] / 1e9 for key in ("peak_memory", "free_memory",
                                                              "disk", "free_disk")}  # fmt: skip
    if facts["peak_memory_bytes"] > facts["free_memory_bytes"]:
        size = context.config.engine.group_size
        fewer = f"engine.group_size={max(1, size // 2)}, " if size and size > 1 else ""
        yield (
            f"memory: the run will take about {gigabytes['peak_memory']:.1f} GB, and "
            f"{gigabytes['free_memory']:.1f} GB are free; try {fewer}"
            f"data.batch_size={max(1, context.config.data.batch_size // 2)} (with "
            "data.accumulation_steps=2), or model.gradient_checkpointing=true"
        )
    if facts["disk_bytes"] > facts["free_disk_bytes"]:
        yield (
            f"disk: the run folder will take about {gigabytes['disk']:.1f} GB, and "
            f"{gigabytes['free_disk']:.1f} GB are free; choose another --output, or free some"
        )
