"""Federated algorithms: how a round's updates are folded into the next state of a run."""

from __future__ import annotations

import copy

from fedclip.catalog import FLAGS, STRATEGIES, StrategyEntry, in_file
from fedclip.config.lookup import load
from fedclip.errors import FedclipError, UsageError
from fedclip.federated.strategies.averaging import FedAvg
from fedclip.federated.strategies.base import Setting, Strategy

__all__ = ["FedAvg", "Setting", "Strategy", "create_strategy", "load_strategy"]


def create_strategy(name: str, setting: Setting | None = None) -> Strategy:
    """The strategy of that name: a row of the catalogue, an installed one, or a user's class."""
    return make_strategy(name, load_strategy(name)[0], setting or Setting())


def load_strategy(name: str) -> tuple[type[Strategy] | Strategy, StrategyEntry]:
    """Resolve a name to a strategy class (or the object given), and its options."""
    found = load("strategies", name)
    row = STRATEGIES.get(name)
    if row is not None:
        return found, row
    if not issubclass(found if isinstance(found, type) else type(found), Strategy):
        file, _, attribute = name.rpartition(":")
        what = f"{file} has no class {attribute}" if in_file(name) else f"{name} is no class"
        raise UsageError(
            f"federation.strategy: {what} that extends fedclip.federated.strategies.Strategy"
        )
    flags = {flag: getattr(found, flag) for flag in FLAGS}
    odd = [flag for flag, value in flags.items() if not isinstance(value, bool)]
    if odd:
        raise UsageError(
            f"federation.strategy: {name}: {odd[0]} must be True or False, got {flags[odd[0]]!r}"
        )
    options = found.options
    if not isinstance(options, tuple | list) or not all(isinstance(key, str) for key in options):
        raise UsageError(
            f"federation.strategy: {name}: options must list keys of the configuration, such as "
            f'("federation.q",), got {options!r}'
        )
    return found, StrategyEntry(name, options=tuple(options), **flags)


def make_strategy(name: str, own: type[Strategy] | Strategy, setting: Setting) -> Strategy:
    """An object of a strategy's class; of an object, a copy that knows the run."""
    if isinstance(own, Strategy):
        made = copy.deepcopy(own)
        made.setting = setting
        return made
    if name in STRATEGIES:
        return own(setting)
    try:
        return own(setting)
    except FedclipError:
        raise
    except Exception as error:
        raise UsageError(
            f"federation.strategy: {name} cannot be made: {type(error).__name__}: {error}; its "
            "__init__ must take the Setting and hand it to super().__init__, or be left out"
        ) from error
