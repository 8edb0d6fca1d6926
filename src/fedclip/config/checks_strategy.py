"""Checks of what may be combined with which strategy, by the flags of the catalogue.

A strategy with a row is checked with the configuration; a class from elsewhere before its run
begins, by the same function, when its flags are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedclip.catalog import STRATEGIES, StrategyEntry, strategy_row
from fedclip.config.attack import attack_problems
from fedclip.config.checks_data import rank_sources
from fedclip.config.checks_tasks import one_model_each
from fedclip.config.robust import robust_problems
from fedclip.config.section import CrossProblem
from fedclip.config.secure import secure_problems

if TYPE_CHECKING:
    from fedclip.config.tree import Config


def named_strategy_problems(config: Config) -> Iterator[CrossProblem]:
    """What does not fit a strategy that has a row, and what fits none but those."""
    found = [*_dynamic_ranks(config)]
    if flags := STRATEGIES.get(config.federation.strategy):
        found += strategy_problems(config, flags)
    for problem in found:
        yield problem.on("federation.strategy")


def strategy_problems(config: Config, flags: StrategyEntry) -> Iterator[CrossProblem]:
    """What does not fit the strategy, which has these flags, and why."""
    name = config.federation.strategy
    if flags.needs_lora and (reason := config.model.no_lora):
        yield CrossProblem(
            "federation.strategy",
            f"federation.strategy: {name} combines LoRA factors, but {reason}; use fedavg, or "
            f"train an adapter{_say('needs_lora', name, 'False')}",
        )
    checks = (_dora, _ranks, _scaffold, _ditto, _server_optimizer, _sharing, _privacy)
    for check in (*checks, robust_problems, secure_problems, attack_problems):
        yield from check(config, flags)


def _say(flag: str, name: str, value: str = "True") -> str:
    """How a class that has no row says that a check is not for it."""
    return "" if name in STRATEGIES else f", or say `{flag} = {value}` in the class if it is so"


def _those(flag: str, name: str) -> str:
    return ", ".join(_with_flag(flag)) + _say(flag, name)


def _with_flag(flag: str) -> list[str]:
    return sorted(name for name, row in STRATEGIES.items() if getattr(row, flag))


def _dora(config: Config, flags: StrategyEntry) -> Iterator[CrossProblem]:
    name = config.federation.strategy
    if config.model.lora.use_dora and not flags.allows_dora:
        yield CrossProblem(
            "model.lora.use_dora",
            f"model.lora.use_dora: {name} works on the product B A, which is not the whole of "
            f"a DoRA update; use it with {_those('allows_dora', name)}",
        )


def _ranks(config: Config, flags: StrategyEntry) -> Iterator[CrossProblem]:
    given, name = rank_sources(config), config.federation.strategy
    if given and not flags.mixes_ranks:
        yield CrossProblem(
            given[0],
            f"{given[0]} makes clients of different ranks, which {name} cannot mix; set "
            f"federation.strategy to {_those('mixes_ranks', name)}",
        )


def _dynamic_ranks(config: Config) -> Iterator[CrossProblem]:
    federation, name = config.federation, config.federation.strategy
    if not federation.dynamic_ranks.enabled:
        return
    if not strategy_row(name).dynamic_ranks:
        yield CrossProblem(
            "federation.dynamic_ranks.enabled",
            "federation.dynamic_ranks cuts the mean of the round's updates, which goes with "
            f"federation.strategy {' or '.join(_with_flag('dynamic_ranks'))}, not with {name}",
        )
    if federation.scaffold or federation.ditto_mu is not None:
        key = "federation.scaffold" if federation.scaffold else "federation.ditto_mu"
        yield CrossProblem(
            key,
            f"{key} needs factors that keep their meaning from round to round, but "
            "federation.dynamic_ranks turns them; use one of the two",
        )


def _scaffold(config: Config, flags: StrategyEntry) -> Iterator[CrossProblem]:
    if config.federation.scaffold and not flags.averages:
        yield CrossProblem(
            "federation.scaffold",
            "federation.scaffold corrects gradients of tensors that are averaged one by one, "
            f"which {config.federation.strategy} does not do; use it with "
            f"{_those('averages', config.federation.strategy)}",
        )


def _ditto(config: Config, flags: StrategyEntry) -> Iterator[CrossProblem]:
    name = config.federation.strategy
    if config.federation.ditto_mu is not None and not flags.stable_coordinates:
        yield CrossProblem(
            "federation.ditto_mu",
            "federation.ditto_mu pulls personal factors to shared ones, which must keep their "
            f"meaning from round to round; {name} does not share any that do; use it with "
            f"{_those('stable_coordinates', name)}",
        )


def _server_optimizer(config: Config, flags: StrategyEntry) -> Iterator[CrossProblem]:
    server, name = config.federation.server_optimizer.name, config.federation.strategy
    dynamic = config.federation.dynamic_ranks.enabled
    if server == "none" or (flags.steps_in_place and not dynamic):
        return
    yield CrossProblem(
        "federation.server_optimizer.name",
        f"federation.server_optimizer.name: {server} steps from the old tensors towards the "
        f"proposed ones, which {name} proposes in other coordinates or not at all; use it "
        f"with {_those('steps_in_place', name)}, without dynamic ranks",
    )


def _sharing(config: Config, flags: StrategyEntry) -> Iterator[CrossProblem]:
    mode, name = config.federation.sharing.mode, config.federation.strategy
    if mode == "shared":
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


def _privacy(config: Config, flags: StrategyEntry) -> Iterator[CrossProblem]:
    unit, name = config.privacy.unit, config.federation.strategy
    if unit is not None and flags.personal:
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
