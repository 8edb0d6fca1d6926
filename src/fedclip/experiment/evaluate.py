"""Figures of a run's model, as it stands or in a state of the run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedclip.config import Config
from fedclip.evaluation.metrics import chosen
from fedclip.evaluation.per_client import (
    evaluate_federation,
    evaluate_personal,
    measured,
    together,
)
from fedclip.evaluation.predictions import Classifier, Images, Predictions, classify
from fedclip.evaluation.retrieval import evaluate_pairs, evaluate_personal_pairs
from fedclip.evaluation.unseen import How, base_to_new, forgetting
from fedclip.experiment.context import Parts, TaskParts
from fedclip.models.clip import CLIPLoRAWrapper
from fedclip.models.stacked.prefix_cache import PixelInputs
from fedclip.records import RunState

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
    return together(found, chosen(parts.config.evaluation.metrics))


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
    if parts.data.captioned:
        return _evaluate_captions(parts, personal, how)
    how["metrics"] = chosen(parts.config.evaluation.metrics)
    with parts.model.zero_shot() if base else nullcontext():
        if personal is not None:
            return evaluate_personal(classifier, images, parts.data, **how)
        how["keep_hits"] = parts.config.evaluation.keep_hits
        return evaluate_federation(classifier(), images, parts.data, **how)


def _evaluate_captions(
    parts: Parts, personal: RunState | None, how: dict[str, Any]
) -> dict[str, Any]:
    """Retrieval by the model as it stands, or by each client's own."""
    if personal is None:
        return evaluate_pairs(parts.model, parts.images, parts.data, **how)

    def own(client_id: str) -> CLIPLoRAWrapper:
        parts.model.set_parameters(personal.of(client_id))
        return parts.model

    return evaluate_personal_pairs(own, parts.images, parts.data, **how)


def predict_all(
    parts: Parts, *, base: bool = False, personal: RunState | None = None
) -> tuple[Predictions, dict[str, Predictions]]:
    """Predictions on the central test set, and on each client's, as `evaluate_parts` takes them.

    With a `personal` state the central ones are the clients' together, also for the base model.
    """
    classifier, images = _judges(parts, base, personal)
    config, data = parts.config, parts.data
    test, by_client = measured(data, config.evaluation.max_examples, config.seed)

    def on(indices: NDArray[np.int64], client_id: str | None = None) -> Predictions:
        return classify(
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
            return Predictions.concatenate(list(own.values())), own
        sets = [test, *by_client.values()]
        central, *rest = on(np.concatenate(sets)).split([len(rows) for rows in sets])
    return central, dict(zip(by_client, rest, strict=True))


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
            seed=config.seed if parts.data.test_seed is None else parts.data.test_seed,
            how=how,
        )
    if parts.data.new_classes is not None:
        found |= base_to_new(parts.model, state.shift, parts.data, base=base, how=how)
    return found


def _batch_size(config: Config) -> int:
    """As much memory as training takes, at most: no activations are kept in evaluation."""
    return min(256, 4 * config.data.batch_size)
