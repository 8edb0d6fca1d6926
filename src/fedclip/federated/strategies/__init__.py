"""Federated algorithms: how a round's updates are folded into the next state of a run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from fedclip.errors import UsageError
from fedclip.federated.strategies.base import Setting, Strategy
from fedclip.federated.strategies.cores import FedSB
from fedclip.federated.strategies.means import (
    FFA,
    FedAvg,
    FedIT,
    FedSA,
    LocalOnly,
    QFedAvg,
    RoLoRA,
)
from fedclip.federated.strategies.products import FedSVD, FlexLoRA, HetLoRA, LoraFair
from fedclip.federated.strategies.shifts import FedEx, FLoRA

__all__ = ["STRATEGIES", "FedAvg", "Setting", "Strategy", "create_strategy"]

STRATEGIES: dict[str, Callable[[Setting], Strategy]] = {
    "fedavg": FedAvg,
    "fedit": FedIT,
    "ffa": FFA,
    "rolora": RoLoRA,
    "fedsa": FedSA,
    "flora": FLoRA,
    "flexlora": FlexLoRA,
    "hetlora": HetLoRA,
    "fedex": FedEx,
    "fedsvd": FedSVD,
    "lora_fair": LoraFair,
    "fed_sb": FedSB,
    "qfedavg": QFedAvg,
    "local": LocalOnly,
    # One client that holds all images: FedAvg of one is that client.
    "centralised": FedAvg,
}


def create_strategy(name: str, setting: Setting | None = None) -> Strategy:
    """The strategy of that name, or the class that `path/to/file.py:Name` names."""
    setting = setting or Setting()
    if name in STRATEGIES:
        return STRATEGIES[name](setting)
    if ".py:" in name:
        return _own_strategy(name)(setting)
    known = ", ".join(STRATEGIES)
    raise UsageError(
        f"federation.strategy: unknown strategy {name!r}; known: {known}; or a class of your own "
        "as path/to/file.py:Name"
    )


def _own_strategy(name: str) -> Callable[[Setting], Strategy]:
    """A class from a user's file."""
    file, _, attribute = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"federation.strategy: there is no file {file}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(
            f"federation.strategy: {file} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise UsageError(
            f"federation.strategy: {file} has no class {attribute} that extends "
            "fedclip.federated.strategies.Strategy"
        )
    return found
