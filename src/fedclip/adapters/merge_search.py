"""Weights of a merge, found by trying: no gradients, only accuracy on validation examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.optimize import differential_evolution

from fedclip.adapters.load import finished, without_files
from fedclip.config import Config
from fedclip.config.loading import load_config
from fedclip.data.federated_data import FederatedData
from fedclip.device import resolve_device, resolve_precision
from fedclip.errors import UsageError
from fedclip.evaluation import metrics
from fedclip.evaluation.per_client import at_most
from fedclip.evaluation.predictions import How, classify
from fedclip.experiment.build import check_partition, load_tasks, model_seed
from fedclip.experiment.class_coverage import Coverage
from fedclip.experiment.context import for_task
from fedclip.experiment.folder import CONFIG
from fedclip.models.adapter_folder import check_base
from fedclip.models.adapter_merge import Recipe, combine
from fedclip.models.adapter_updates import LoraAdapter, layer_weights, put_head
from fedclip.models.clip import CLIPLoRAWrapper, create_clip_model
from fedclip.models.peft_lora import base_parameters
from fedclip.models.stacked.prefix_cache import PixelInputs
from fedclip.models.state import adapter_sha256
from fedclip.reports.listener import Listener
from fedclip.seeding import seed_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

HIGHEST = 1.5
_EVALUATIONS = 60
_MEMBERS = 5  # of the population, for each weight
_TIE = 1e-4  # accuracy that a nat is worth: less than any one example


@dataclass(frozen=True)
class Validation:
    """A run's validation examples, and its base model, whose weights take merged adapters in."""

    name: str
    model: CLIPLoRAWrapper
    own: dict[str, torch.Tensor]
    images: PixelInputs
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    precision: str

    @classmethod
    def of_run(cls, run: str | Path, adapter: LoraAdapter, listener: Listener) -> list[Validation]:
        """Open a finished run whose base and head are those of the adapters to be merged.

        A run of several tasks has as many validation sets.
        """
        folder = finished(run)
        config = load_config(folder.path / CONFIG)
        config = without_files(config, "a search")
        if config.task == "contrastive":
            raise UsageError(
                f"{run} has learned from captions; weights are searched by the accuracy on classes"
            )
        tasks = load_tasks(config, listener)
        check_partition(tasks, folder)
        return [
            cls.of(f"{run}: {name}" if name else str(run), for_task(config, name), data, adapter)
            for name, data in tasks.items()
        ]

    @classmethod
    def of(cls, run: str, config: Config, data: FederatedData, adapter: LoraAdapter) -> Validation:
        """The validation examples of one data set of a run."""
        if not len(data.validation):
            raise UsageError(
                f"{run} has no validation examples to search on (data.validation_fraction is "
                f"{config.data.validation_fraction:g})"
            )
        limit = config.evaluation.max_examples
        coverage = Coverage.of_data(data, limit, config.seed)
        coverage.warn_of_validation(f"{run}: the weights are")
        bare = config.model.lora.model_copy(update={"enabled": False})
        model = create_clip_model(
            config.model.model_copy(update={"lora": bare}),
            class_names=data.class_names,
            templates=data.templates,
            seed=model_seed(config),
        )
        base = base_parameters(model.network)
        check_base(
            adapter.folder,
            adapter.notes,
            base_model=model.base_name,
            base_sha256=adapter_sha256(base),
        )
        if (model.head == "linear") != bool(adapter.head):
            raise UsageError(
                f"{run} has a {model.head} head, the adapters to be merged have another; weights "
                "can be searched on runs of the same kind only"
            )
        device = resolve_device(config.device)
        model.to(device).requires_grad_(False)
        return cls(
            name=run,
            model=model,
            own={path: w.clone() for path, w in layer_weights(model, adapter).items()},
            images=PixelInputs(data.pixels, device),
            labels=data.labels,
            indices=at_most(
                data.validation,
                limit,
                seed_for(config.seed, "evaluation", "validation"),
            ),
            precision=resolve_precision(config.precision, device),
        )

    @torch.no_grad()
    def judge(self, adapter: LoraAdapter) -> tuple[float, float]:
        """Accuracy, and loss in nats, of the base with an adapter."""
        for path, weight in layer_weights(self.model, adapter).items():
            a, b = (factor.to(weight) for factor in adapter.layers[path])
            weight.copy_(self.own[path] + b @ a)
        put_head(self.model, adapter)
        self.model.text_head.forget()
        found = classify(
            self.model,
            self.images,
            self.labels,
            self.indices,
            How(self.model.device, self.precision),
        )
        accuracy, loss = metrics.accuracy(found), metrics.loss(found)
        assert accuracy is not None
        assert loss is not None
        return accuracy, loss


def search_weights(
    adapters: Sequence[LoraAdapter], recipe: Recipe, validations: Sequence[Validation]
) -> tuple[tuple[float, ...], list[dict[str, Any]]]:
    """Weights from 0 to 1.5 with the highest mean validation accuracy that a short search finds.

    Differential evolution (Storn and Price 1997) from the recipe's weights and a seeded spread of
    others, about 60 merges in all; equal accuracies are told apart by the loss. Returns the
    weights, and for each validation set and their mean the accuracies `before` and `after`. The
    weights at the start are kept where nothing better was found.
    """

    def judged(weights: Sequence[float]) -> list[tuple[float, float]]:
        merged, _ = combine(adapters, replace(recipe, weights=tuple(map(float, weights))))
        return [validation.judge(merged) for validation in validations]

    def badness(weights: Sequence[float]) -> float:
        accuracy, loss = np.mean(judged(weights), axis=0)
        return float(_TIE * loss - accuracy)

    count = len(adapters)
    found = differential_evolution(
        badness,
        bounds=[(0.0, HIGHEST)] * count,
        x0=np.clip(recipe.weights, 0.0, HIGHEST),
        popsize=_MEMBERS,
        maxiter=max(1, _EVALUATIONS // (_MEMBERS * count) - 1),
        polish=False,
        rng=np.random.default_rng(seed_for(recipe.seed, "merge", "search")),
    )
    better = found.fun < badness(recipe.weights)
    best = tuple(round(float(w), 4) for w in found.x) if better else recipe.weights
    before, after = judged(recipe.weights), judged(best)
    rows = [
        {"validation": name, "before": old, "after": new}
        for name, old, new in zip(
            [*(validation.name for validation in validations), "mean"],
            _with_mean(before),
            _with_mean(after),
            strict=True,
        )
    ]
    return best, rows


def _with_mean(judged: Sequence[tuple[float, float]]) -> list[float]:
    accuracies = [accuracy for accuracy, _ in judged]
    return [*accuracies, sum(accuracies) / len(accuracies)]
