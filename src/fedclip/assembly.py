"""From a configuration to the parts of a run, and their figures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedclip.compute import product_dtype, resolve_device, resolve_precision
from fedclip.config import Config
from fedclip.data.datasets import load_source
from fedclip.data.federation import FederatedData, load_federated
from fedclip.engine_choice import settle_engine
from fedclip.engines.processes import Processes
from fedclip.errors import UsageError
from fedclip.evaluation.accuracy import Classifier, Images
from fedclip.evaluation.detail import Answers, answers
from fedclip.evaluation.federated import evaluate_federation, evaluate_personal, measured
from fedclip.evaluation.forgetting import How, base_to_new, forgetting
from fedclip.models.base import load_pixels
from fedclip.models.clip import create_clip_model
from fedclip.models.inputs import PixelInputs
from fedclip.models.stacked import StackedClients, can_stack
from fedclip.parts import Parts
from fedclip.records import RunState
from fedclip.reports.progress import Listener
from fedclip.runs import PARTITION, RunFolder
from fedclip.seeding import seed_for

if TYPE_CHECKING:
    from numpy.typing import NDArray


def assemble(
    config: Config,
    listener: Listener,
    processes: Processes | None = None,
    data: FederatedData | None = None,
) -> Parts:
    """Loads the base model and the data set, and builds the model that both call for.

    Of several `processes`, all assemble the same parts. `data` takes the data set's place.
    """
    for name in config.evaluation.other_data:
        load_source(name)  # one that is missing is reported before the training
    device = resolve_device(config.device)
    data = data or load_data(config, listener)
    model = create_clip_model(
        config.model,
        class_names=data.class_names,
        templates=data.templates,
        seed=model_seed(config),
    )
    model.to(device)
    precision = resolve_precision(config.precision, device)
    inputs = PixelInputs(data.pixels, device)
    parts = Parts(
        config, model, data, device, precision, inputs, processes=processes or Processes()
    )
    if can_stack(model):
        stacked = StackedClients(
            model, products=product_dtype(precision), compiled=config.engine.compile
        )
        parts = replace(parts, stacked=stacked)
    return settle_engine(parts, listener)


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
    if any(own.keys() & state.shared.keys() for own in state.private.values()):
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


def check_partition(data: FederatedData, folder: RunFolder) -> None:
    """Refuses data that is no longer what the run began with."""
    if folder.read_json(PARTITION) != data.partition_record():
        raise UsageError(
            f"{folder.path / PARTITION}: the data or its partition has changed since the run "
            "began; put the data back as it was, or start a new run"
        )


def model_seed(config: Config) -> int:
    """Seed of what is drawn when the model is made: adapter, linear head, random base weights."""
    return seed_for(config.seed, "model")
