"""From a configuration to the parts of a run, and their figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fedclip.compute import product_dtype, resolve_device, resolve_precision
from fedclip.config import Config
from fedclip.data.datasets import load_source
from fedclip.data.federation import FederatedData, load_federated
from fedclip.engine_choice import settle_engine, settle_task_engines
from fedclip.engines.processes import Processes
from fedclip.errors import UsageError
from fedclip.evaluation.accuracy import Classifier, Images
from fedclip.evaluation.detail import Answers, answers
from fedclip.evaluation.federated import (
    evaluate_federation,
    evaluate_personal,
    measured,
    together,
)
from fedclip.evaluation.forgetting import How, base_to_new, forgetting
from fedclip.models.base import load_pixels
from fedclip.models.clip import CLIPLoRAWrapper, create_clip_model
from fedclip.models.inputs import PixelInputs
from fedclip.models.stacked import StackedClients, can_stack
from fedclip.parts import Parts, TaskParts
from fedclip.records import RunState
from fedclip.reports.progress import Listener
from fedclip.runs import PARTITION, RunFolder
from fedclip.seeding import seed_for

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Recorded(Protocol):
    """What a partition was made of, or is."""

    def partition_record(self) -> dict[str, Any]:
        """What `partition.json` holds."""
        ...


def assemble_run(
    config: Config, listener: Listener, processes: Processes | None = None
) -> Parts | TaskParts:
    """The parts of a run, of one task or several."""
    put_together = assemble_tasks if config.tasks else assemble
    return put_together(config, listener, processes)


def assemble(config: Config, listener: Listener, processes: Processes | None = None) -> Parts:
    """Loads the base model and the data set, and builds the model that both call for.

    Of several `processes`, all assemble the same parts.
    """
    assert not config.tasks
    for name in config.evaluation.other_data:
        load_source(name)  # one that is missing is reported before the training
    device = resolve_device(config.device)
    data = load_data(config, listener)
    model = create_clip_model(
        config.model,
        class_names=data.class_names,
        templates=data.templates,
        seed=model_seed(config),
    )
    model.to(device)
    precision = resolve_precision(config.precision, device)
    parts = Parts(
        config=config,
        model=model,
        data=data,
        device=device,
        precision=precision,
        images=PixelInputs(data.pixels, device),
        stacked=_stacked(config, model, precision),
        processes=processes or Processes(),
    )
    return settle_engine(parts, listener)


def assemble_tasks(
    config: Config, listener: Listener, processes: Processes | None = None
) -> TaskParts:
    """The same for several tasks: the data of each, and one model for all.

    Without a task set, the model knows the classes of all tasks.
    """
    device = resolve_device(config.device)
    configs = {name: for_task(config, name) for name in config.tasks}
    data = {name: _of_task(load_data(own, listener), name) for name, own in configs.items()}
    model = create_clip_model(
        config.model,
        class_names=_union(own.class_names for own in data.values()),
        templates=_union(own.templates for own in data.values()),
        seed=model_seed(config),
    )
    for name, own in data.items():
        model.add_task(name, own.class_names, own.templates)
    model.to(device)
    precision = resolve_precision(config.precision, device)
    common: dict[str, Any] = {
        "model": model,
        "device": device,
        "precision": precision,
        "stacked": _stacked(config, model, precision),
        "processes": processes or Processes(),
    }
    tasks = {
        name: Parts(
            config=configs[name], data=own, images=PixelInputs(own.pixels, device), **common
        )
        for name, own in data.items()
    }
    return settle_task_engines(TaskParts(config=config, tasks=tasks, **common), listener)


def for_task(config: Config, name: str) -> Config:
    """The configuration of one task of a run, as if it were the only one."""
    data, federation = config.tasks[name], config.federation
    clients = data.num_clients or federation.num_clients
    federation = federation.model_copy(update={"num_clients": clients})
    return config.model_copy(update={"data": data, "federation": federation, "tasks": {}})


def _of_task(data: FederatedData, task: str) -> FederatedData:
    """The data with the task's name before those of its clients."""
    clients = (replace(c, client_id=f"{task}/{c.client_id}") for c in data.clients)
    return replace(data, clients=tuple(clients))


def _union(texts: Iterable[Sequence[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for some in texts for text in some))


def _stacked(config: Config, model: CLIPLoRAWrapper, precision: str) -> StackedClients | None:
    if not can_stack(model):
        return None
    return StackedClients(model, products=product_dtype(precision), compiled=config.engine.compile)


def load_data(config: Config, listener: Listener) -> FederatedData:
    """Loads a configuration's data set as its model wants it."""
    listener.message(f"loading {config.model.model_name} and {config.data.name}")
    pixels = load_pixels(config.model.model_name)
    return load_federated(
        config.data,
        num_clients=config.federation.num_clients,
        seed=config.seed,
        to_pixels=pixels.to_pixels,
        pixels_key=pixels.key,
        progress=listener.images,
    )


def evaluate_run(
    parts: Parts | TaskParts, state: RunState, *, personal: bool = False, base: bool = False
) -> dict[str, Any]:
    """Figures of a state of the run, of several tasks each by the adapter that it has.

    With `personal` each client's examples are judged by its own model. Of several tasks, the
    accuracies and the loss are means over tasks, and `accuracy_by_task` has each one's.
    """
    if isinstance(parts, Parts):
        parts.put(state)
        return evaluate_parts(parts, base=base, personal=state if personal else None)
    found = {}
    for name, task in parts.tasks.items():
        parts.model.set_task(name)
        homes = {state.member_of.get(client_id) for client_id in task.clients}
        own = personal or len(homes) > 1
        parts.put(state.group_of(next(iter(task.clients))))
        found[name] = evaluate_parts(task, base=base, personal=state if own else None)
    return together(found)


def evaluate_matrix(parts: TaskParts, state: RunState) -> dict[str, dict[str, float | None]]:
    """Accuracy of every adapter of a state on the central test set of every task."""
    adapters = dict(state.groups) or {"shared": state}
    rows = {}
    for adapter, own in adapters.items():
        parts.put(own)
        rows[adapter] = evaluate_row(parts)
    return rows


def evaluate_merged(parts: TaskParts, adapter: Path) -> dict[str, float | None]:
    """Accuracy of an adapter folder on every task; the model keeps that adapter."""
    parts.shift({})
    parts.model.set_task(None)
    parts.model.load_adapter(adapter)
    return evaluate_row(parts)


def evaluate_row(parts: TaskParts) -> dict[str, float | None]:
    """Accuracy of the adapter in the model on the central test set of every task."""
    row = {}
    for name, task in parts.tasks.items():
        parts.model.set_task(name)
        row[name] = evaluate_parts(task)["accuracy"]
    return row


def evaluate_parts(
    parts: Parts, *, base: bool = False, personal: RunState | None = None
) -> dict[str, Any]:
    """Figures of the model as it stands, or of the `base` model, as the configuration asks.

    With a `personal` state each client's examples are judged by its own model.
    """
    classifier, images = _judges(parts, base, personal)
    how: dict[str, Any] = {
        "max_examples": parts.config.evaluation.max_examples,
        "seed": parts.config.seed,
        "device": parts.device,
        "precision": parts.precision,
        "batch_size": _batch_size(parts.config),
    }
    with parts.model.zero_shot() if base else nullcontext():
        if personal is not None:
            return evaluate_personal(classifier, images, parts.data, **how)
        return evaluate_federation(classifier(), images, parts.data, **how)


def answer_all(
    parts: Parts, *, base: bool = False, personal: RunState | None = None
) -> tuple[Answers, dict[str, Answers]]:
    """Answers on the central test set, and on each client's, as `evaluate_parts` takes them.

    With a `personal` state the central ones are the clients' together, also for the base model.
    """
    classifier, images = _judges(parts, base, personal)
    config, data = parts.config, parts.data
    test, by_client = measured(data, config.evaluation.max_examples, config.seed)

    def on(indices: NDArray[np.int64], client_id: str | None = None) -> Answers:
        return answers(
            classifier(client_id),
            images,
            data.labels,
            indices,
            device=parts.device,
            precision=parts.precision,
            batch_size=_batch_size(config),
        )

    with parts.model.zero_shot() if base else nullcontext():
        if personal is not None:
            own = {client_id: on(rows, client_id) for client_id, rows in by_client.items()}
            return Answers.together(list(own.values())), own
        every = on(np.concatenate([test, *by_client.values()]))
    sizes = [len(test), *map(len, by_client.values())]
    first, *rest = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return every.of(first), dict(zip(by_client, map(every.of, rest), strict=True))


def _judges(
    parts: Parts, base: bool, personal: RunState | None
) -> tuple[Callable[..., Classifier], Images]:
    """What classifies, for all or for the client of an id, and the inputs that it takes."""
    images: Images = PixelInputs(parts.data.pixels, parts.device)
    if parts.stacked is not None and not base:
        images = parts.images

    def classifier(client_id: str | None = None) -> Classifier:
        if client_id is not None and personal is not None and not base:
            parts.model.set_parameters(personal.of(client_id))
        if parts.stacked is not None and not base:
            return parts.stacked.merged(parts.model.trainable())
        return parts.model

    return classifier, images


def evaluate_unseen(parts: Parts, state: RunState, base: tuple[float, float]) -> dict[str, Any]:
    """Figures on what was not trained, as far as the configuration asks for any.

    `base` are the accuracies on the classes that were trained, zero-shot and last. Models of the
    clients' own are not measured so.
    """
    config, found = parts.config, dict[str, Any]()
    if state.groups or any(own.keys() & state.shared.keys() for own in state.private.values()):
        return found
    how = How(parts.device, parts.precision, _batch_size(config))
    if config.evaluation.other_data:
        found["forgetting"] = forgetting(
            parts.model,
            state.shift,
            config.evaluation.other_data,
            max_examples=config.evaluation.max_examples,
            seed=config.seed,
            how=how,
        )
    if parts.data.new_classes is not None:
        found |= base_to_new(parts.model, state.shift, parts.data, base=base, how=how)
    return found


def _batch_size(config: Config) -> int:
    """As much memory as training takes, at most: no activations are kept in evaluation."""
    return min(256, 4 * config.data.batch_size)


def check_partition(data: Recorded, folder: RunFolder) -> None:
    """Refuses data that is no longer what the run began with."""
    if folder.read_json(PARTITION) != data.partition_record():
        raise UsageError(
            f"{folder.path / PARTITION}: the data or its partition has changed since the run "
            "began; put the data back as it was, or start a new run"
        )


def model_seed(config: Config) -> int:
    """Seed of what is drawn when the model is made: adapter, linear head, random base weights."""
    return seed_for(config.seed, "model")
