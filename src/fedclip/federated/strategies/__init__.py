"""Federated algorithms: how a round's updates are folded into the next state of a run."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from fedclip.errors import FedclipError, UsageError
from fedclip.federated.strategies.averaging import (
    FFA,
    FedAvg,
    FedIT,
    FedSA,
    LocalOnly,
    QFedAvg,
    RoLoRA,
)
from fedclip.federated.strategies.base import Setting, Strategy
from fedclip.federated.strategies.fed_sb import FedSB
from fedclip.federated.strategies.product_space import FedSVD, FlexLoRA, HetLoRA, LoraFair
from fedclip.federated.strategies.weight_folding import FedEx, FLoRA

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
        return _made(name, _own_strategy(name), setting)
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
    # A name that no other module has; dataclasses look their module up by it.
    own_name = f"_fedclip_strategy_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()}"
    spec = importlib.util.spec_from_file_location(own_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[own_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[own_name]
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


def _made(name: str, own: Callable[[Setting], Strategy], setting: Setting) -> Strategy:
    """An object of a user's class."""
    try:
        return own(setting)
    except FedclipError:
        raise
    except Exception as error:
        raise UsageError(
            f"federation.strategy: {name} cannot be made: {type(error).__name__}: {error}; its "
            "__init__ must take the Setting and hand it to super().__init__, or be left out"
        ) from error
