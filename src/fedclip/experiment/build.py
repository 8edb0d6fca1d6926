"""Build the context of a run from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from fedclip.catalog import in_file
from fedclip.config import Config, DataConfig, ModelConfig
from fedclip.config.names import each_class_once
from fedclip.data.datasets import load_source
from fedclip.data.federated_data import PRIVATE, FederatedData, private_record
from fedclip.data.loading import load_federated
from fedclip.data.picture_sizes import warn_if_shrunk
from fedclip.data.splits import SPLIT_RULE
from fedclip.device import product_dtype, resolve_device, resolve_precision
from fedclip.errors import UsageError
from fedclip.experiment.context import ONLY, RunContext, Task, for_task, partition_record
from fedclip.experiment.engine import settle_engine
from fedclip.experiment.folder import PARTITION, RunFolder
from fedclip.experiment.strategy import settle_ranks
from fedclip.federated.engines.sharded import Processes
from fedclip.models.clip import CLIPLoRAWrapper, create_clip_model
from fedclip.models.pretrained import EMBEDDED, RANDOM, advice_on_size, load_pixels, load_tokens
from fedclip.models.stacked.clients import StackedClients
from fedclip.models.stacked.prefix_cache import PixelInputs
from fedclip.models.text_head import each_once
from fedclip.reports.listener import Listener
from fedclip.seeding import seed_for

Data = TypeVar("Data", bound=DataConfig)


def build(
    config: Config,
    listener: Listener,
    processes: Processes | None = None,
    data: FederatedData | None = None,
    model: CLIPLoRAWrapper | None = None,
) -> RunContext:
    """Build the context of a run: base model, data of each task, and the model that all call for.

    With several tasks the model knows the classes of all of them until one is set. Of several
    `processes`, all build the same. `data` takes the place of a single data set, and `model` that
    of one that would be built for it.
    """
    for name in config.evaluation.other_data:
        load_source(name)  # one that is missing is reported before the training
    device = resolve_device(config.device)
    loaded = load_tasks(config, listener) if data is None else {ONLY: data}
    model = model or _model(config, loaded)
    model.to(device)
    precision = resolve_precision(config.precision, device)
    captioned = any(own.captioned for own in loaded.values())
    context = RunContext(
        config=config,
        model=model,
        device=device,
        precision=precision,
        tasks={n: Task(own, PixelInputs(own.pixels, device)) for n, own in loaded.items()},
        stacked=None if captioned else _stacked(config, model, precision),
        processes=processes or Processes(),
    )
    return settle_ranks(settle_engine(context, listener))


def load_tasks(config: Config, listener: Listener) -> dict[str, FederatedData]:
    """Loads the data set of each task, with the task's name before those of its clients."""
    if not config.tasks:
        return {ONLY: load_data(config, listener)}
    return {
        name: _of_task(load_data(for_task(config, name), listener), name) for name in config.tasks
    }


def _of_task(data: FederatedData, task: str) -> FederatedData:
    clients = (replace(c, client_id=f"{task}/{c.client_id}") for c in data.clients)
    return replace(data, clients=tuple(clients))


def _model(config: Config, loaded: Mapping[str, FederatedData]) -> CLIPLoRAWrapper:
    """The model with the classes of its data; of several tasks with those of all, and by task."""
    seed, several = model_seed(config), loaded.values()
    if not config.tasks:
        (data,) = several
        names = None if data.captioned else data.class_names
        return create_clip_model(
            model_config(config), class_names=names, templates=data.templates, seed=seed
        )
    model = create_clip_model(
        config.model,
        class_names=each_class_once(own.class_names for own in several),
        templates=each_once(own.templates for own in several),
        seed=seed,
    )
    for name, own in loaded.items():
        model.add_task(name, own.class_names, own.templates)
    return model


def _stacked(config: Config, model: CLIPLoRAWrapper, precision: str) -> StackedClients | None:
    if model.kind.unstacked:
        return None
    return StackedClients(model, products=product_dtype(precision))


def load_data(config: Config, listener: Listener) -> FederatedData:
    """Loads a configuration's data set as its model wants it."""
    listener.message(f"loading {config.model.model_name} and {config.data.name}")
    pixels = load_pixels(config.model.model_name)
    captions = config.task == "contrastive"
    data = load_federated(
        config.data,
        num_clients=config.federation.num_clients,
        seed=config.seed,
        to_pixels=pixels.to_pixels,
        pixels_key=pixels.key,
        progress=listener.images,
        captions=captions,
        read_captions=load_tokens(config.model.model_name).read if captions else None,
    )
    warn_if_shrunk(data, pixels.image_size, advice_on_size(config.model.model_name))
    return data


def check_partition(data: Mapping[str, FederatedData], folder: RunFolder) -> None:
    """Refuses data, by task, that is no longer what the run began with."""
    check_split_rule(folder)
    found, now = folder.read_json(PARTITION), partition_record(data)
    if found != (private_record(now) if found.get(PRIVATE) is True else now):
        raise UsageError(
            f"{folder.path / PARTITION}: the data or its partition has changed since the run "
            "began; put the data back as it was, or start a new run"
        )


def check_split_rule(folder: RunFolder) -> None:
    """Refuses a run whose test images another version's rule chose: this one trains on them."""
    if not (folder.path / PARTITION).exists():
        return
    record = folder.read_json(PARTITION)
    rule = record.get("split", 1) if isinstance(record, dict) else None
    if rule != SPLIT_RULE:
        raise UsageError(
            f"{folder.path / PARTITION}: the run was begun by another version of fedclip, which "
            f"chose test and validation images by another rule (split {rule}, here {SPLIT_RULE}); "
            "go on with it in that version, or start a new run. `info`, `predict`, `serve` and "
            "`export` work as before"
        )


def model_config(config: Config) -> ModelConfig:
    """The model's configuration: captions need no classifier, and leave room for any classes."""
    if config.task == "classification":
        return config.model
    return config.model.model_copy(update={"head": "text"})


def model_seed(config: Config) -> int:
    """Seed of what is drawn when the model is made: adapter, linear head, random base weights."""
    return seed_for(config.seed, "model")


def with_absolute_paths(config: Config) -> Config:
    """The configuration with local files by their full path: a run may go on from elsewhere."""
    model = config.model
    tasks = {name: _with_absolute_path(task) for name, task in config.tasks.items()}
    start = RANDOM if model.model_name.startswith(RANDOM) else ""
    name = model.model_name.removeprefix(start)
    if name not in EMBEDDED and Path(name).is_dir():
        model = model.model_copy(update={"model_name": f"{start}{Path(name).resolve()}"})
    strategy = absolute_name(config.federation.strategy)
    engine = absolute_name(config.engine.name)
    rule = config.robust.rule and absolute_name(config.robust.rule)
    measured = {
        key: tuple(map(absolute_name, getattr(config.evaluation, key)))
        for key in ("other_data", "metrics")
    }
    data = _with_absolute_path(config.data)
    tracking = tuple(map(absolute_name, config.tracking))
    keys = config.deploy.keys
    deploy = config.deploy.model_copy(update={"keys": keys and str(Path(keys).absolute())})
    return config.model_copy(
        update={
            "data": data,
            "tasks": tasks,
            "model": model,
            "federation": config.federation.model_copy(update={"strategy": strategy}),
            "robust": config.robust.model_copy(update={"rule": rule}),
            "engine": config.engine.model_copy(update={"name": engine}),
            "evaluation": config.evaluation.model_copy(update=measured),
            "tracking": tracking,
            "deploy": deploy,
        }
    )


def absolute_name(name: str) -> str:
    """A name of the catalogue that means the same from any working directory."""
    file, _, attribute = name.rpartition(":")
    return f"{Path(file).resolve()}:{attribute}" if in_file(name) else name


def _with_absolute_path(data: Data) -> Data:
    data = data.model_copy(update={"name": absolute_name(data.name)})
    folder, mark, options = (data.path or "").partition("?")  # as of the hub's data sets
    shards = folder.endswith(".tar")  # one, or a pattern of them
    if not folder or not (Path(folder).exists() or shards):
        return data
    return data.model_copy(update={"path": f"{Path(folder).resolve()}{mark}{options}"})
