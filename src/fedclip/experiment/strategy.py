"""Build the aggregation strategy, and its wrappers, from the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedclip.catalog import StrategyEntry, strategy_row
from fedclip.config import Config
from fedclip.config.checks_strategy import strategy_problems
from fedclip.config.lookup import load
from fedclip.config.robust import too_few
from fedclip.config.section import lookup
from fedclip.config.secure import USUAL_LARGEST_UPDATE
from fedclip.errors import UsageError
from fedclip.experiment.context import RunContext
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


def choose_strategy(context: RunContext) -> Strategy:
    """Build the strategy that the configuration asks for, inside its wrappers."""
    federation = context.config.federation
    name = federation.strategy
    own, flags = load_strategy(name)
    check_composition(context.config, flags)
    strategy = make_strategy(name, own, setting_of(context, flags))
    dynamic = federation.dynamic_ranks
    if dynamic.enabled:
        plan = RankPlan(federation.rounds, **dynamic.model_dump(exclude={"enabled"}))
        _refuse_minimum(plan, context.model.get_parameters())
        exact = flags.dynamic_ranks == "product"
        strategy = DynamicRanks(strategy.setting, plan, exact=exact)
    strategy = _robust(strategy, context)
    if federation.scaffold:
        strategy = Scaffold(strategy, sum(context.clients.values()))
    server = federation.server_optimizer
    if server.name != "none":
        options = server.model_dump(exclude={"name"})
        strategy = ServerOptimizer(strategy, server.name, options)
    if federation.ditto_mu is not None:
        strategy = Ditto(strategy, federation.ditto_mu)
    return _by_group(strategy, context)


def _robust(strategy: Strategy, context: RunContext) -> Strategy:
    """The strategy behind a robust rule or a cap, where the configuration asks for one."""
    robust = context.config.robust
    if robust.chosen is None or robust.attackers is None:
        return strategy if robust.largest_share is None else Robust(strategy, robust.largest_share)
    key = "federation.clients_per_round"
    text = too_few(robust.chosen, robust.attackers, context.clients_per_round, key)
    if text is not None:
        raise UsageError(text)
    found = load("robust_rules", robust.chosen)
    if not (isinstance(found, Rule) or callable(found)):
        raise UsageError(f"robust.rule: {robust.chosen} must be a function (gram, f) of weights")
    rule = found if isinstance(found, Rule) else Rule(found)
    limit = context.config.deploy.largest_update or USUAL_LARGEST_UPDATE
    plan = RobustPlan(robust.chosen, rule, robust.attackers, robust.mixing, limit)
    return Robust(strategy, plan)


def held_in_memory(context: RunContext) -> str | None:
    """What a robust rule or a cap keeps of each round, in words; None without them."""
    robust = context.config.robust
    if robust.chosen is None and robust.largest_share is None:
        return None
    clients = context.clients_per_round
    megabytes = clients * sum(t.nbytes for t in context.model.get_parameters().values()) / 1e6
    what = robust.chosen or "robust.largest_share"
    return f"{what} holds a round's updates in memory, {megabytes:.1f} MB for {clients} clients"


def is_personal(config: Config) -> bool:
    """Whether accuracy is that of personalised models on local test sets."""
    flags = load_strategy(config.federation.strategy)[1]
    return flags.personal or config.federation.ditto_mu is not None


def check_composition(config: Config, flags: StrategyEntry) -> None:
    """Refuses what does not go with a strategy; of a class from elsewhere only its flags say it."""
    problems = strategy_problems(config, flags)
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


def _by_group(strategy: Strategy, context: RunContext) -> Strategy:
    """The strategy for groups of clients, where they do not all train one adapter."""
    sharing = context.config.federation.sharing
    if sharing.mode == "clusters":
        return Clustered(strategy, context.clients, sharing.cluster_round, sharing.clusters)
    if sharing.mode == "shared":
        return strategy
    if sharing.mode == "per_task":
        return Grouped(strategy, context.task_of)
    shared_rank = sharing.shared_rank or context.config.model.lora.r // 2
    return SharedAndTask(strategy, context.task_of, shared_rank)


def setting_of(context: RunContext, flags: StrategyEntry) -> Setting:
    """What a strategy may know of the run."""
    return Setting(
        seed=context.config.seed,
        scalings=scalings(context.model.network),
        ranks=_client_ranks(context),
        rslora=context.config.model.lora.use_rslora,
        options=options_of(context.config, flags),
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


def _client_ranks(context: RunContext) -> dict[str, int]:
    """The clients' ranks as configured or settled; none where all have r."""
    spec, r = context.config.federation.client_ranks, context.config.model.lora.r
    if spec is None:
        return {}
    ranks = client_ranks(spec, list(context.clients), context.config.seed)
    above = [client_id for client_id, rank in ranks.items() if rank > r]
    if above:
        raise UsageError(
            f"federation.client_ranks: {above[0]} has rank {ranks[above[0]]}, but the server's "
            f"adapter has model.lora.r: {r}; raise that, or lower the client's"
        )
    return ranks


def settle_ranks(context: RunContext) -> RunContext:
    """The context with the clients' ranks by name, in place of their memory.

    What fits is measured, and libraries or machines may differ: what the first process finds is
    what all of them do, also after a resume.
    """
    federation = context.config.federation
    if federation.client_memory_mb is None:
        return context
    found = _ranks_for_memory(context, federation.client_memory_mb)
    ranks = dict(zip(found, context.processes.first_numbers(list(found.values())), strict=True))
    federation = federation.model_copy(update={"client_ranks": ranks, "client_memory_mb": None})
    return replace(context, config=context.config.model_copy(update={"federation": federation}))


def _ranks_for_memory(context: RunContext, memory_mb: Mapping[str, float]) -> dict[str, int]:
    assert context.stacked is not None  # an adapter without DoRA, or the configuration is refused
    state = context.model.get_parameters()
    return ranks_for_memory(
        memory_mb,
        list(context.clients),
        layers=[
            Layer(state[pair.a].shape[1], len(state[pair.b])) for pair in pairs(state).values()
        ],
        base_bytes=4 * context.model.get_model_summary()["base_parameters"],
        activation_bytes=activation_bytes(
            context.stacked,
            state,
            image_size=context.model.image_size,
            batch_size=context.config.data.batch_size,
            device=context.device,
        ),
        maximum=context.config.model.lora.r,
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
