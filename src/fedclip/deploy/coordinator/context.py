"""The context of a run with clients on other machines: a model, and the coordinator's tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedclip.config import Config
from fedclip.config.names import check_classes_differ
from fedclip.data.federated_data import FederatedData
from fedclip.data.loading import warn_of_one_class
from fedclip.data.prompts import PROMPTS
from fedclip.errors import UsageError
from fedclip.experiment.build import build, load_data
from fedclip.experiment.context import RunContext
from fedclip.experiment.privacy_checks import require_at_sites
from fedclip.models.pretrained import load_pixels
from fedclip.reports.listener import Listener

_NONE = np.empty(0, dtype=np.int64)


def coordinator_context(config: Config, listener: Listener, sites: dict[str, int]) -> RunContext:
    """The model, and the data that the coordinator tests on; the clients are the `sites`."""
    only_here = {
        "data.train_classes": config.data.train_classes is not None,
        "data.test_sites": config.data.test_sites is not None,
        "data.shots": config.data.shots is not None,
        "tasks": bool(config.tasks),
        "attack.name": config.attack.name != "none",
        "task: contrastive": config.task != "classification",
        "federation.sharing.mode": config.federation.sharing.mode != "shared",
        "federation.client_memory_mb": config.federation.client_memory_mb is not None,
    }
    for key in (key for key, given in only_here.items() if given):
        raise UsageError(f"{key} is for runs on one machine; leave it out")
    require_at_sites(config)
    alone = _as_one_client(config)
    data = _tests(load_data(alone, listener)) if config.deploy.test_data else _no_data(config)
    context = build(alone, listener, data=data)
    return replace(
        context, config=config.model_copy(update={"engine": context.config.engine}), sites=sites
    )


def expected_sites(config: Config, keyed: Sequence[str]) -> tuple[frozenset[str] | None, int]:
    """The names that may take part, None for any, and how many of them are waited for."""
    names = config.deploy.sites
    if names is None and config.deploy.keys is not None:
        names = tuple(keyed)
    if names is None:
        return None, config.federation.num_clients
    if not names:
        raise UsageError(
            f"deploy.keys: {config.deploy.keys} has no keys of sites; `fedclip keys site NAME` "
            "makes some"
        )
    return frozenset(names), len(names)


def _as_one_client(config: Config) -> Config:
    """The configuration by which the coordinator loads its test data, undivided."""
    partition = config.data.partition.model_copy(update={"name": "iid"})
    federation = config.federation.model_copy(
        update={"num_clients": 1, "clients_per_round": None, "strategy": "fedavg"}
    )
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"partition": partition}),
            "federation": federation,
            "engine": config.engine.model_copy(update={"group_size": 1}),
        }
    )


def _tests(data: FederatedData) -> FederatedData:
    """All of the data as the test set, unless it has a predefined test split."""
    own = [c.train for c in data.clients] + [c.validation for c in data.clients]
    held = np.concatenate([_NONE, *(c.test for c in data.clients)])
    split = not np.array_equal(np.sort(held), data.test)
    test = data.test if split else np.sort(np.concatenate([*own, held]))
    validation = data.validation if split else _NONE
    return replace(data, clients=(), test=test, validation=validation)


def _no_data(config: Config) -> FederatedData:
    """Classes without images."""
    names = config.data.class_names
    if names is None:
        raise UsageError(
            "data.class_names must name the classes where deploy.test_data is false, as the "
            "coordinator has no images from which it could learn them"
        )
    check_classes_differ(names, "data.class_names")
    templates = config.data.templates or PROMPTS["imagefolder"].templates
    black = np.zeros((8, 8, 3), np.uint8)
    pixels = load_pixels(config.model.model_name).to_pixels([black])
    data = FederatedData(
        name="none",
        pixels=pixels[:0],
        labels=_NONE,
        class_names=tuple(names),
        templates=tuple(templates),
        clients=(),
        validation=_NONE,
        test=_NONE,
        bad_images=(),
        fingerprint="",
        partition={"name": "sites"},
    )
    warn_of_one_class(data)
    return data
