"""Evaluate a run's model, currently loaded or restored from a `RunState`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedclip.evaluation.metrics import chosen
from fedclip.evaluation.per_client import (
    evaluate_federation,
    evaluate_personal,
    measured,
    together,
)
from fedclip.evaluation.predictions import Classifier, How, Images, Predictions, classify
from fedclip.evaluation.retrieval import evaluate_pairs, evaluate_personal_pairs
from fedclip.evaluation.unseen import base_to_new, forgetting
from fedclip.experiment.context import ONLY, LastTest, RunContext
from fedclip.experiment.hostile import TARGET
from fedclip.models.clip import CLIPLoRAWrapper
from fedclip.models.stacked.prefix_cache import PixelInputs
from fedclip.records import RunState

if TYPE_CHECKING:
    from numpy.typing import NDArray


def evaluate_run(
    context: RunContext, state: RunState, *, personal: bool = False, base: bool = False
) -> dict[str, Any]:
    """Figures of a state of the run, of several tasks each by the adapter that it has.

    With `personal` each client's examples are judged by its own model. Of several tasks, the
    accuracies and the loss are means over tasks, and `accuracy_by_task` has each one's.
    """
    if not context.several:
        context.put(state)
        found = evaluate_model(context, base=base, personal=state if personal else None)
        return found | ({} if base else backdoor_figures(context))
    found = {}
    for name, task in context.by_task().items():
        context.turn_to(name)
        homes = {state.member_of.get(client_id) for client_id in task.clients}
        own = personal or len(homes) > 1
        context.put(state.group_of(next(iter(task.clients))))
        found[name] = evaluate_model(task, base=base, personal=state if own else None)
    return together(found, chosen(context.config.evaluation.metrics))


def evaluate_matrix(context: RunContext, state: RunState) -> dict[str, dict[str, float | None]]:
    """Accuracy of every adapter of a state on the central test set of every task."""
    adapters = dict(state.groups) or {"shared": state}
    rows = {}
    for adapter, own in adapters.items():
        context.put(own)
        rows[adapter] = evaluate_row(context)
    return rows


def evaluate_merged(context: RunContext, adapter: Path) -> dict[str, float | None]:
    """Accuracy of an adapter folder on every task; the model keeps that adapter."""
    context.shift({})
    context.turn_to(None)
    context.model.load_adapter(adapter)
    return evaluate_row(context)


def evaluate_row(context: RunContext) -> dict[str, float | None]:
    """Accuracy of the adapter in the model on the central test set of every task."""
    row = {}
    for name, task in context.by_task().items():
        context.turn_to(name)
        row[name] = evaluate_model(task)["accuracy"]
    return row


def evaluate_model(
    context: RunContext, *, base: bool = False, personal: RunState | None = None
) -> dict[str, Any]:
    """Evaluate the current model, or the `base` model, as configured.

    With a `personal` state each client's examples are judged by its own model.
    """
    classifier, images = _judges(context, base, personal)
    evaluation, data, how = context.config.evaluation, context.data, how_of(context)
    limits: dict[str, Any] = {"max_examples": evaluation.max_examples, "seed": context.config.seed}
    if data.captioned:
        return _evaluate_captions(context, personal, limits)
    limits["metrics"] = chosen(evaluation.metrics)
    limits["hear"] = (lambda found: None) if base else partial(_keep, context, personal is not None)
    with context.model.zero_shot() if base else nullcontext():
        if personal is not None:
            return evaluate_personal(classifier, images, data, how, **limits)
        keep = evaluation.keep_hits
        return evaluate_federation(classifier(), images, data, how, keep_hits=keep, **limits)


def _keep(context: RunContext, personal: bool, found: Predictions) -> None:
    """Keep the predictions on the test set for the report, with the rows that they are of."""
    config = context.config
    test, by_client = measured(context.data, config.evaluation.max_examples, config.seed)
    rows = np.concatenate([*by_client.values(), test[:0]]) if personal else test
    kept = LastTest(replace(found, logits=found.logits[:, :0]), rows)
    context.tasks[ONLY].last_test[:] = [kept]


def _evaluate_captions(
    context: RunContext, personal: RunState | None, limits: dict[str, Any]
) -> dict[str, Any]:
    """Retrieval by the global model, or by personalised ones."""
    images, data, how = context.images, context.data, how_of(context)
    if personal is None:
        return evaluate_pairs(context.model, images, data, how, **limits)

    def own(client_id: str) -> CLIPLoRAWrapper:
        context.model.set_parameters(personal.of(client_id))
        return context.model

    return evaluate_personal_pairs(own, images, data, how, **limits)


def predict_all(
    context: RunContext, *, base: bool = False, personal: RunState | None = None
) -> tuple[Predictions, dict[str, Predictions]]:
    """Predictions on the central test set, and on each client's, as `evaluate_model` takes them.

    With a `personal` state the central ones are the clients' together, also for the base model.
    """
    classifier, images = _judges(context, base, personal)
    config, data = context.config, context.data
    test, by_client = measured(data, config.evaluation.max_examples, config.seed)

    def on(indices: NDArray[np.int64], client_id: str | None = None) -> Predictions:
        return classify(classifier(client_id), images, data.labels, indices, how_of(context))

    with context.model.zero_shot() if base else nullcontext():
        if personal is not None:
            own = {client_id: on(rows, client_id) for client_id, rows in by_client.items()}
            return Predictions.concatenate(list(own.values())), own
        sets = [test, *by_client.values()]
        central, *rest = on(np.concatenate(sets)).split([len(rows) for rows in sets])
    return central, dict(zip(by_client, rest, strict=True))


def backdoor_figures(context: RunContext) -> dict[str, float | None]:
    """Share of the test images of other classes that a backdoor's patch has taken for its target.

    Of the model as it is; nothing of a run without a backdoor.
    """
    if context.config.attack.name != "backdoor" or context.poisoned is None:
        return {}
    config, stamped = context.config, context.as_trained()
    test = measured(context.data, config.evaluation.max_examples, config.seed)[0]
    rows = test[context.data.labels[test] != TARGET]
    classifier, images = _judges(stamped, base=False, personal=None)
    found = classify(classifier(), images, stamped.data.labels, rows, how_of(context))
    return {"backdoor_success": float(np.mean(found.predicted == TARGET)) if len(rows) else None}


def _judges(
    context: RunContext, base: bool, personal: RunState | None
) -> tuple[Callable[..., Classifier], Images]:
    """What classifies, for all or for the client of an id, and the inputs that it takes."""
    images: Images = PixelInputs(context.data.pixels, context.device)
    if context.stacked is not None and not base:
        images = context.images

    def classifier(client_id: str | None = None) -> Classifier:
        if client_id is not None and personal is not None and not base:
            context.model.set_parameters(personal.of(client_id))
        if context.stacked is not None and not base:
            return context.stacked.merged(context.model.trainable())
        return context.model

    return classifier, images


def evaluate_unseen(
    context: RunContext, state: RunState, base: tuple[float, float]
) -> dict[str, Any]:
    """Figures on what was not trained, as far as the configuration asks for any.

    `base` are the accuracies on the classes that were trained, zero-shot and last. Models of the
    clients' own are not measured so.
    """
    config, found = context.config, dict[str, Any]()
    if state.groups or any(own.keys() & state.shared.keys() for own in state.private.values()):
        return found
    how = how_of(context)
    if config.evaluation.other_data:
        found["forgetting"] = forgetting(
            context.model,
            state.shift,
            config.evaluation.other_data,
            max_examples=config.evaluation.max_examples,
            seed=config.seed if context.data.test_seed is None else context.data.test_seed,
            how=how,
        )
    if context.data.new_classes is not None:
        found |= base_to_new(context.model, state.shift, context.data, base=base, how=how)
    return found


def how_of(context: RunContext) -> How:
    """Batches that take as much memory as training, at most: no activations are kept here."""
    return How(context.device, context.precision, min(256, 4 * context.config.data.batch_size))
