"""Look at the data of a configuration without training: who has what, and what is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from fedclip.config import Config
from fedclip.data.datasets import load_source
from fedclip.data.federated_data import FederatedData
from fedclip.data.loading import load_federated
from fedclip.data.picture_sizes import shrunk, warn_if_shrunk
from fedclip.data.picture_types import in_words
from fedclip.data.rgb import full_size
from fedclip.data.source import some
from fedclip.errors import FedclipError
from fedclip.experiment.context import ONLY, for_task
from fedclip.models.pretrained import advice_on_size, load_pixels
from fedclip.reports.progress import Listener

MOST_COLUMNS = 12
"""Classes with a column of their own."""


def survey(config: Config, listener: Listener) -> list[dict[str, Any]]:
    """Facts of the data of a run, one mapping for each task, and a table of sites and classes.

    Every image is opened, divided and held out as a run does it, which raises what a run would.
    """
    names = list(config.tasks) or [ONLY]
    return [_of_one(name, for_task(config, name), listener) for name in names]


def _of_one(task: str, config: Config, listener: Listener) -> dict[str, Any]:
    sizes: list[tuple[int, int]] = []

    def measure(images: Sequence[Any]) -> np.ndarray:
        sizes.extend(full_size(image) for image in images if isinstance(image, Image.Image))
        return np.zeros((len(images), 1, 1, 1), dtype=np.uint8)

    data = config.data
    source = load_source(
        data.name,
        path=data.path,
        layout=data.layout,
        class_names=data.class_names,
        templates=data.templates,
    )
    found = load_federated(
        data,
        num_clients=config.federation.num_clients,
        seed=config.seed,
        to_pixels=measure,
        pixels_key="survey",
        progress=listener.images,
        captions=config.task == "contrastive",
        source=source,
    )
    facts = data_facts(task, found) | {"passed_over": in_words(source.passed_over) or "none"}
    del sizes[0]  # that of a trial
    return facts | _sizes(sizes, config, found) | {"table": _table(found)}


def data_facts(task: str, data: FederatedData) -> dict[str, Any]:
    """What the data of a task hold."""
    return ({"task": task} if task else {}) | {
        "images": len(data.labels),
        "classes": "captions" if data.captioned else len(data.class_names),
        "sites": len(data.clients),
        "central_test_images": len(data.test),
        "central_validation_images": len(data.validation),
        "damaged": len(data.bad_images),
    }


def _sizes(sizes: list[tuple[int, int]], config: Config, found: FederatedData) -> dict[str, Any]:
    """Sizes of the images, and how much they are made smaller for the model."""
    if not sizes:
        return {}
    smallest, largest = min(sizes, key=np.prod), max(sizes, key=np.prod)
    facts: dict[str, Any] = {
        "smallest_image": "{} x {}".format(*smallest),
        "largest_image": "{} x {}".format(*largest),
    }
    try:
        edge = load_pixels(config.model.model_name).image_size
    except FedclipError as error:
        return facts | {"model_input": f"unknown: {error}"}
    warn_if_shrunk(found, edge, advice_on_size(config.model.model_name))
    return facts | {
        "model_input": f"{edge} x {edge}",
        "shrunk": f"{shrunk(found.median_size, edge) or 0:.2g}-fold (short edge, median)",
    }


def _table(data: FederatedData) -> list[dict[str, Any]]:
    """Images of each site, by class where the classes are few."""
    rows = []
    for client, counts in zip(data.clients, data.table(), strict=True):
        row: dict[str, Any] = {"site": client.client_id, "images": sum(counts)}
        if not data.captioned and len(counts) <= MOST_COLUMNS:
            row |= {f"class {name}": n for name, n in zip(data.class_names, counts, strict=True)}
        elif not data.captioned:
            none = [name for name, n in zip(data.class_names, counts, strict=True) if not n]
            row |= {"classes": len(counts) - len(none), "without": some(none, 6) or "none"}
        rows.append(row)
    return rows
