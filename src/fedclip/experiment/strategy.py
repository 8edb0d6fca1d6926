"""From a configuration to the strategy of its rounds, with all that goes around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from fedclip.catalog import StrategyEntry, load, strategy_row
from fedclip.config import Config
from fedclip.config.checks_strategy import strategy_problems
from fedclip.config.robust import too_few
from fedclip.config.section import lookup
from fedclip.errors import UsageError
from fedclip.experiment.context import Parts, TaskParts
from fedclip.federated.client_ranks import client_ranks, ranks_for_memory
from fedclip.federated.engines.memory import activation_bytes
from fedclip.federated.robust import Robust, RobustPlan
from fedclip.federated.strategies import Setting, Strategy, load_strategy, make_strategy
from fedclip.federated.strategies.dynamic_ranks import DynamicRanks, RankPlan
from fedclip.federated.strategies.groups import Clustered, Grouped, SharedAndTask
from fedclip.federated.strategies.wrappers import Ditto, Scaffold, ServerOptimizer
from fedclip.federated.traffic import Layer, Traffic, by_formula
from fedclip.lora.names import pairs
from fedclip.lora.rank_budget import least_ranks
from fedclip.lora.robust_rules import Rule
from fedclip.models.peft_lora import scalings
from fedclip.records import State

AnyParts = TypeVar("AnyParts", Parts, TaskParts)


def choose_strategy(parts: Parts | TaskParts) -> Strategy:
    """The strategy that the configuration asks for, and what it puts around that."""
    federation = parts.config.federation
    name = federation.strategy
    own, flags = load_strategy(name)
    check_composition(parts.config, flags)
    strategy = make_strategy(name, own, setting_of(parts, flags))
    dynamic = federation.dynamic_ranks
    if dynamic.enabled:
        plan = RankPlan(federation.rounds, **dynamic.model_dump(exclude={"enabled"}))
        _refuse_minimum(plan, parts.model.get_parameters())
        exact = flags.dynamic_ranks == "product"
        strategy = DynamicRanks(strategy.setting, plan, exact=exact)
    strategy = _robust(strategy, parts)
    if federation.scaffold:
        strategy = Scaffold(strategy, sum(parts.clients.values()))
    server = federation.server_optimizer
    if server.name != "none":
        options = server.model_dump(exclude={"name"})
        strategy = ServerOptimizer(strategy, server.name, options)
    if federation.ditto_mu is not None:
        strategy = Ditto(strategy, federation.ditto_mu)
    return _by_group(strategy, parts)


def _robust(strategy: Strategy, parts: Parts | TaskParts) -> Strategy:
    """The strategy behind a robust rule or a cap, where the configuration asks for one."""
    robust = parts.config.robust
    if robust.chosen is None or robust.attackers is None:
        return strategy if robust.largest_share is None else Robust(strategy, robust.largest_share)
    key = "federation.clients_per_round"
    text = too_few(robust.chosen, robust.attackers, parts.clients_per_round, key)
    if text is not None:
        raise UsageError(text)
    found = load("robust_rules", robust.chosen)
    if not (isinstance(found, Rule) or callable(found)):
        raise UsageError(f"robust.rule: {robust.chosen} must be a function (gram, f) of weights")
    rule = found if isinstance(found, Rule) else Rule(found)
    limit = parts.config.deploy.largest_update
    plan = RobustPlan(robust.chosen, rule, robust.attackers, robust.mixing, limit)
    return Robust(strategy, plan)


def held_in_memory(parts: Parts | TaskParts) -> str | None:
    """What a robust rule or a cap keeps of each round, in words; None without them."""
    robust = parts.config.robust
    if robust.chosen is None and robust.largest_share is None:
        return None
    clients = parts.clients_per_round
    megabytes = clients * sum(t.nbytes for t in parts.model.get_parameters().values()) / 1e6
    what = robust.chosen or "robust.largest_share"
    return f"{what} holds a round's updates in memory, {megabytes:.1f} MB for {clients} clients"


def is_personal(config: Config) -> bool:
    """Whether accuracy is that of each client's own model on its own test images."""
    flags = load_strategy(config.federation.strategy)[1]
    return flags.personal or config.federation.ditto_mu is not None


def check_composition(config: Config, flags: StrategyEntry) -> None:
    """Refuses what does not go with a strategy; of a class from elsewhere only its flags say it."""
    problems = strategy_problems(config.model_dump(), config.federation.strategy, flags)
    texts = [problem.text for problem in problems]
    if texts:
        raise UsageError("; ".join(texts))


def _refuse_minimum(plan: RankPlan, state: State) -> None:
    """Refuses a least rank that all layers together cannot have within the budget."""
    sizes = {layer: len(state[pair.a]) for layer, pair in pairs(state).items()}
    least, full = sum(least_ranks(plan.minimum, sizes).values()), sum(sizes.values())
    if least > plan.budget * full:
        raise UsageError(
            f"federation.dynamic_ranks.budget: {plan.budget:g} of the layers' ranks, {full} by "
            "model.lora.r and model.lora.rank_pattern, is less than "
            f"federation.dynamic_ranks.minimum ({plan.minimum}) gives to all layers, {least}; "
            "raise the budget, or lower the minimum"
        )


def _by_group(strategy: Strategy, parts: Parts | TaskParts) -> Strategy:
    """The strategy for groups of clients, where they do not all train one adapter."""
    sharing = parts.config.federation.sharing
    if sharing.mode == "clusters":
        return Clustered(strategy, parts.clients, sharing.cluster_round, sharing.clusters)
    if sharing.mode == "shared":
        return strategy
    assert isinstance(parts, TaskParts)
    if sharing.mode == "per_task":
        return Grouped(strategy, parts.task_of)
    shared_rank = sharing.shared_rank or parts.config.model.lora.r // 2
    return SharedAndTask(strategy, parts.task_of, shared_rank)


def setting_of(parts: Parts | TaskParts, flags: StrategyEntry) -> Setting:
    """What a strategy may know of the run."""
    return Setting(
        seed=parts.config.seed,
        scalings=scalings(parts.model.network),
        ranks=_client_ranks(parts),
        rslora=parts.config.model.lora.use_rslora,
        options=options_of(parts.config, flags),
    )


def options_of(config: Config, flags: StrategyEntry) -> dict[str, Any]:
    """The values of the keys that a strategy reads, by their last word."""
    values, options = config.model_dump(), {}
    for key in flags.options:
        section, _, word = key.rpartition(".")
        where = lookup(values, section) if section else values
        if not isinstance(where, Mapping) or word not in where:
            raise UsageError(
                f"federation.strategy: {config.federation.strategy} reads {key} (its `options`), "
                "which is no key of the configuration"
            )
        options[word] = where[word]
    return options


def _client_ranks(parts: Parts | TaskParts) -> dict[str, int]:
    """The clients' ranks as configured or settled; none where all have r."""
    spec, r = parts.config.federation.client_ranks, parts.config.model.lora.r
    if spec is None:
        return {}
    ranks = client_ranks(spec, list(parts.clients), parts.config.seed)
    above = [client_id for client_id, rank in ranks.items() if rank > r]
    if above:
        raise UsageError(
            f"federation.client_ranks: {above[0]} has rank {ranks[above[0]]}, but the server's "
            f"adapter has model.lora.r: {r}; raise that, or lower the client's"
        )
    return ranks


def settle_ranks(parts: AnyParts) -> AnyParts:
    """The parts with the clients' ranks by name in the place of their memory.

    What fits is measured, and libraries or machines may differ: what the first process finds is
    what all of them do, also after a resume.
    """
    federation = parts.config.federation
    if federation.client_memory_mb is None:
        return parts
    found = _ranks_for_memory(parts, federation.client_memory_mb)
    ranks = dict(zip(found, parts.processes.first_numbers(list(found.values())), strict=True))
    federation = federation.model_copy(update={"client_ranks": ranks, "client_memory_mb": None})
    return replace(parts, config=parts.config.model_copy(update={"federation": federation}))


def _ranks_for_memory(parts: Parts | TaskParts, memory_mb: Mapping[str, float]) -> dict[str, int]:
    assert parts.stacked is not None  # an adapter without DoRA, or the configuration is refused
    state = parts.model.get_parameters()
    return ranks_for_memory(
        memory_mb,
        list(parts.clients),
        layers=[
            Layer(state[pair.a].shape[1], len(state[pair.b])) for pair in pairs(state).values()
        ],
        base_bytes=4 * parts.model.get_model_summary()["base_parameters"],
        activation_bytes=activation_bytes(
            parts.stacked,
            state,
            image_size=parts.model.image_size,
            batch_size=parts.config.data.batch_size,
            device=parts.device,
        ),
        maximum=parts.config.model.lora.r,
    )


def expected_traffic(config: Config, state: State) -> Traffic:
    """Bytes per client and round, up and down, by formula, of trainable tensors like these.

    Of full fine-tuning all tensors travel. Ranks of clients are not known before their data are:
    every client counts as one of the model's rank, and dynamic ranks count as the rank they start
    from. `federation.num_clients` or `clients_per_round` says how many updates FLoRA and FedEx
    send back.
    """
    federation, found = config.federation, pairs(state)
    factor = 2 if federation.scaffold else 1
    inside = {name for pair in found.values() for name in pair}
    rest = sum(tensor.numel() for name, tensor in state.items() if name not in inside)
    formula = strategy_row(federation.strategy).traffic
    layers = [Layer(state[p.a].shape[1], len(state[p.b]), len(state[p.a])) for p in found.values()]
    share = federation.clients_per_round or federation.num_clients
    clients = share if isinstance(share, int) else max(1, round(share * federation.num_clients))
    up, down = by_formula(formula, layers, config.model.lora.r, clients, rest=rest)
    return Traffic(factor * up, factor * down)
