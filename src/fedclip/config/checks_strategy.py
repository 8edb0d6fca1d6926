"""Checks of what may be combined with which strategy, by the flags of the catalogue.

A strategy with a row is checked with the configuration; a class from elsewhere before its run
begins, by the same function, when its flags are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedclip.catalog import STRATEGIES, StrategyEntry, strategy_row
from fedclip.config.attack import attack_problems
from fedclip.config.checks_tasks import one_model_each
from fedclip.config.model import no_lora
from fedclip.config.robust import robust_problems
from fedclip.config.section import CrossProblem, lookup, number
from fedclip.config.secure import secure_problems


def named_strategy_problems(values: Mapping[str, Any]) -> Iterator[CrossProblem]:
    """What does not fit a strategy that has a row, and what fits none but those."""
    name = lookup(values, "federation.strategy")
    if not isinstance(name, str):  # which is reported elsewhere
        return
    yield from _dynamic_ranks(values, name)
    if name in STRATEGIES:
        yield from strategy_problems(values, name, STRATEGIES[name])


def strategy_problems(
    values: Mapping[str, Any], name: str, flags: StrategyEntry
) -> Iterator[CrossProblem]:
    """What does not fit a strategy with these flags, and why."""
    if flags.needs_lora and (reason := no_lora(values)):
        yield CrossProblem(
            "federation.strategy",
            f"federation.strategy: {name} combines LoRA factors, but {reason}; use fedavg, or "
            f"train an adapter{_say('needs_lora', name, 'False')}",
        )
    checks = (_dora, _ranks, _scaffold, _ditto, _server_optimizer, _sharing, _privacy)
    for check in (*checks, robust_problems, secure_problems, attack_problems):
        yield from check(values, name, flags)


def _say(flag: str, name: str, value: str = "True") -> str:
    """How a class that has no row says that a check is not for it."""
    return "" if name in STRATEGIES else f", or say `{flag} = {value}` in the class if it is so"


def _those(flag: str, name: str) -> str:
    return ", ".join(_with_flag(flag)) + _say(flag, name)


def _with_flag(flag: str) -> list[str]:
    return sorted(name for name, row in STRATEGIES.items() if getattr(row, flag))


def _dora(values: Mapping[str, Any], name: str, flags: StrategyEntry) -> Iterator[CrossProblem]:
    if lookup(values, "model.lora.use_dora") is True and not flags.allows_dora:
        yield CrossProblem(
            "model.lora.use_dora",
            f"model.lora.use_dora: {name} works on the product B A, which is not the whole of "
            f"a DoRA update; use it with {_those('allows_dora', name)}",
        )


def rank_sources(values: Mapping[str, Any]) -> list[str]:
    """The keys given that make clients' ranks differ."""
    sources = [f"federation.{key}" for key in ("client_ranks", "client_memory_mb")]
    return [key for key in sources if lookup(values, key) is not None]


def _ranks(values: Mapping[str, Any], name: str, flags: StrategyEntry) -> Iterator[CrossProblem]:
    given = rank_sources(values)
    if given and not flags.mixes_ranks:
        yield CrossProblem(
            given[0],
            f"{given[0]} makes clients of different ranks, which {name} cannot mix; set "
            f"federation.strategy to {_those('mixes_ranks', name)}",
        )


def _dynamic_ranks(values: Mapping[str, Any], name: str) -> Iterator[CrossProblem]:
    dynamic = lookup(values, "federation.dynamic_ranks.enabled") is True
    if dynamic and not strategy_row(name).dynamic_ranks:
        yield CrossProblem(
            "federation.dynamic_ranks.enabled",
            "federation.dynamic_ranks cuts the mean of the round's updates, which goes with "
            f"federation.strategy {' or '.join(_with_flag('dynamic_ranks'))}, not with {name}",
        )
    around = [
        key
        for key, given in (
            ("federation.scaffold", lookup(values, "federation.scaffold") is True),
            ("federation.ditto_mu", number(values, "federation.ditto_mu") is not None),
        )
        if given
    ]
    if dynamic and around:
        yield CrossProblem(
            around[0],
            f"{around[0]} needs factors that keep their meaning from round to round, but "
            "federation.dynamic_ranks turns them; use one of the two",
        )


def _scaffold(values: Mapping[str, Any], name: str, flags: StrategyEntry) -> Iterator[CrossProblem]:
    if lookup(values, "federation.scaffold") is True and not flags.averages:
        yield CrossProblem(
            "federation.scaffold",
            "federation.scaffold corrects gradients of tensors that are averaged one by one, "
            f"which {name} does not do; use it with {_those('averages', name)}",
        )


def _ditto(values: Mapping[str, Any], name: str, flags: StrategyEntry) -> Iterator[CrossProblem]:
    if number(values, "federation.ditto_mu") is not None and not flags.stable_coordinates:
        yield CrossProblem(
            "federation.ditto_mu",
            "federation.ditto_mu pulls personal factors to shared ones, which must keep their "
            f"meaning from round to round; {name} does not share any that do; use it with "
            f"{_those('stable_coordinates', name)}",
        )


def _server_optimizer(
    values: Mapping[str, Any], name: str, flags: StrategyEntry
) -> Iterator[CrossProblem]:
    server = lookup(values, "federation.server_optimizer.name")
    dynamic = lookup(values, "federation.dynamic_ranks.enabled") is True
    if not isinstance(server, str) or server == "none" or (flags.steps_in_place and not dynamic):
        return
    yield CrossProblem(
        "federation.server_optimizer.name",
        f"federation.server_optimizer.name: {server} steps from the old tensors towards the "
        f"proposed ones, which {name} proposes in other coordinates or not at all; use it "
        f"with {_those('steps_in_place', name)}, without dynamic ranks",
    )


def _sharing(values: Mapping[str, Any], name: str, flags: StrategyEntry) -> Iterator[CrossProblem]:
    mode = lookup(values, "federation.sharing.mode")
    if mode not in ("per_task", "shared+task", "clusters"):
        return
    if flags.personal:
        yield one_model_each(mode, name)
    flag = {"shared+task": "both_factors", "clusters": "averages"}.get(mode)
    if flag is not None and not (flags.averages and getattr(flags, flag)):
        yield CrossProblem(
            "federation.sharing.mode",
            f"federation.sharing.mode: {mode} goes with strategies that average tensors: "
            f"{_those(flag, name)}; federation.strategy is {name}",
        )


def _privacy(values: Mapping[str, Any], name: str, flags: StrategyEntry) -> Iterator[CrossProblem]:
    unit = lookup(values, "privacy.unit")
    if unit in ("example", "client") and flags.personal:
        yield CrossProblem(
            "privacy.unit",
            f"privacy.unit: {name} ends with a model for each client, which is not accounted for; "
            "use a strategy that shares one model, such as ffa, fedsvd or fedavg",
        )
    if unit == "example" and flags.reads_losses:
        yield CrossProblem(
            "privacy.unit",
            f"privacy.unit: example adds noise to gradients, but {name} also reads each client's "
            "exact loss; use another strategy, such as ffa, fedsvd or fedavg",
        )
