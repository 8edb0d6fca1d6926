"""From a configuration to the strategy of its rounds, with all that goes around it."""

from __future__ import annotations

from fedclip.errors import UsageError
from fedclip.federated.strategies import FedAvg, Setting, Strategy, create_strategy
from fedclip.federated.strategies.composed import Ditto, Scaffold, ServerOptimizer
from fedclip.models.lora import scalings
from fedclip.parts import Parts


def choose_strategy(parts: Parts) -> Strategy:
    """The strategy that the configuration asks for, and what it puts around that."""
    federation = parts.config.federation
    strategy = create_strategy(federation.strategy, setting_of(parts))
    if strategy.needs_lora and not parts.model.is_lora_enabled():
        raise UsageError(
            f"federation.strategy: {federation.strategy} combines LoRA factors, but "
            "model.lora.enabled is false; use fedavg, or train an adapter"
        )
    if federation.scaffold:
        assert isinstance(strategy, FedAvg)  # the configuration's checks have seen to it
        strategy = Scaffold(strategy, len(parts.clients))
    server = federation.server_optimizer
    if server.name != "none":
        options = server.model_dump(exclude={"name"})
        strategy = ServerOptimizer(strategy, server.name, options)
    if federation.ditto_mu is not None:
        strategy = Ditto(strategy, federation.ditto_mu)
    return strategy


def setting_of(parts: Parts) -> Setting:
    """What a strategy may know of the run."""
    federation = parts.config.federation
    return Setting(
        seed=parts.config.seed,
        scalings=scalings(parts.model.network) if parts.model.is_lora_enabled() else {},
        options={
            "q": federation.q,
            "ridge": federation.ridge,
            "average_owners": float(federation.average_owners),
            "learning_rate": parts.config.client.learning_rate,
        },
    )
