"""The `attack` section: hostile clients of a simulation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from fedclip.catalog import StrategyEntry, own_rows
from fedclip.config.checks_data import CLIENT_KEYS, may_be_natural, rank_sources
from fedclip.config.section import CrossProblem, Named, Section
from fedclip.errors import UsageError

if TYPE_CHECKING:
    from fedclip.config.tree import Config

NONE = "none"


def _row(name: str) -> Any:
    """An attack of the catalogue; None of `none`, and of what is no name."""
    return own_rows("attacks").get(name)


def _usual() -> str:
    rows = own_rows("attacks").items()
    return ", ".join(f"{row.strength:g} {name}" for name, row in rows if row.strength)


class AttackConfig(Section):
    """Hostile clients of a simulation, to see what a defence is worth; see robust rules."""

    name: Annotated[str, AfterValidator(Named("attacks", also=(NONE,)))] = Field(
        NONE, description="What the hostile clients do. A run over machines has none."
    )
    clients: Annotated[int, Field(ge=0, le=1_000_000)] | None = Field(
        None,
        description="How many clients are hostile, drawn by `seed`, the same ones in every round. "
        "Needed with `name`; 0 is a run without them, to compare with.",
    )
    strength: Annotated[float, Field(ge=1e-3, le=1e6)] | None = Field(
        None, description=f"How strong the attack is; `null`: {_usual()}."
    )

    @property
    def hostile(self) -> int:
        """How many clients attack."""
        return 0 if self.name == NONE else self.clients or 0

    @property
    def chosen_strength(self) -> float | None:
        """The strength, given or usual; None of an attack that has none."""
        return self.strength if self.strength is not None else getattr(
            _row(self.name), "strength", None
        )  # fmt: skip


def too_many(attackers: int, clients: int, key: str) -> str | None:
    """Why so many clients cannot be hostile; None where an honest one is left."""
    if attackers < clients:
        return None
    return (
        f"attack.clients: {attackers} hostile clients leave none that is honest ({key} gives "
        f"{clients}); make it {clients - 1} at most"
    )


def require_no_attack(config: Config, where: str) -> None:
    """Raise UsageError for hostile clients in what is no simulation."""
    if config.attack.name != NONE:
        raise UsageError(
            f"attack.name: {config.attack.name} makes clients of a simulation hostile, for "
            f"`fedclip run` and `bench`; {where} trains with none, so leave `attack` out"
        )


def attack_problems(config: Config, flags: StrategyEntry) -> Iterator[CrossProblem]:
    """What hostile clients do not go with, and why."""
    attack, row = config.attack, _row(config.attack.name)
    if attack.strength is not None and (row is None or row.strength is None):
        text = f"attack.strength is given, and attack.name: {attack.name} has none; leave it out"
        yield CrossProblem("attack.strength", text, ("attack.name",))
    if row is None:
        return
    if attack.strength is not None and attack.strength > row.most:
        yield CrossProblem(
            "attack.strength",
            f"attack.strength of {attack.name} is the {row.means}: {row.most:g} at most, got "
            f"{attack.strength:g}",
        )
    if attack.clients is None:
        yield CrossProblem("attack.clients", "attack.clients must say how many clients attack")
    elif not may_be_natural(config):
        clients = config.federation.num_clients
        if crowded := too_many(attack.clients, clients, "federation.num_clients"):
            yield CrossProblem("attack.clients", crowded, CLIENT_KEYS)
    for key, why in _refused(config, row, flags):
        yield CrossProblem(key, f"{key} does not go with attack.name: {attack.name}, {why}")


def _refused(config: Config, row: Any, flags: StrategyEntry) -> Iterator[tuple[str, str]]:
    """Keys beside which an attack would not be what it says."""
    federation = config.federation
    if flags.pools or flags.traffic.endswith(":nothing"):
        yield (
            "federation.strategy",
            f"as {federation.strategy} combines no updates of several clients",
        )
    if config.tasks:
        yield "tasks", "whose clients share one data set; leave one of the two out"
    if config.privacy.unit is not None:
        yield "privacy.unit", "whose clients know the honest updates, which no promise allows"
    if config.secure.aggregation is not None:
        yield (
            "secure.aggregation",
            "whose clients check sizes and weights themselves, and hostile ones would not",
        )
    if federation.sharing.mode != "shared":
        yield "federation.sharing.mode", "which is of one adapter for all; use shared"
    for key in rank_sources(config):
        yield key, "whose clients send tensors of one shape; leave one of the two out"
    if federation.dynamic_ranks.enabled:
        yield "federation.dynamic_ranks.enabled", "whose clients send all ranks; leave one out"
    if row.falsifies in ("labels", "images") and config.task == "contrastive":
        yield "task", "which falsifies classes; captions have none"
    if row.falsifies == "images" and (flags.personal or federation.ditto_mu is not None):
        key = "federation.strategy" if flags.personal else "federation.ditto_mu"
        yield key, "whose success is that of one shared model"
