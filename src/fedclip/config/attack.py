"""The `attack` section: hostile clients of a simulation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from fedclip.catalog import StrategyEntry, own_rows
from fedclip.config.checks_data import may_be_natural
from fedclip.config.section import CrossProblem, Named, Section, lookup, number
from fedclip.errors import UsageError

NONE = "none"


def _row(name: Any) -> Any:
    """An attack of the catalogue; None of `none`, and of what is no name."""
    return own_rows("attacks").get(name) if isinstance(name, str) else None


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


def require_no_attack(config: Any, where: str) -> None:
    """Raise UsageError for hostile clients in what is no simulation."""
    if config.attack.name != NONE:
        raise UsageError(
            f"attack.name: {config.attack.name} makes clients of a simulation hostile, for "
            f"`fedclip run` and `bench`; {where} trains with none, so leave `attack` out"
        )


def attack_problems(
    values: Mapping[str, Any], name: str, flags: StrategyEntry
) -> Iterator[CrossProblem]:
    """What hostile clients do not go with, and why."""
    given, row = lookup(values, "attack.name"), _row(lookup(values, "attack.name"))
    strength = number(values, "attack.strength")
    if strength is not None and given is not None and (row is None or row.strength is None):
        text = f"attack.strength is given, and attack.name: {given} has none; leave it out"
        yield CrossProblem("attack.strength", text)
    if row is None:
        return
    if strength is not None and strength > row.most:
        yield CrossProblem(
            "attack.strength",
            f"attack.strength of {given} is the {row.means}: {row.most:g} at most, got "
            f"{strength:g}",
        )
    attackers = number(values, "attack.clients")
    if attackers is None:
        yield CrossProblem("attack.clients", "attack.clients must say how many clients attack")
    elif not may_be_natural(values):
        clients = number(values, "federation.num_clients")
        if clients is not None:
            text = too_many(int(attackers), int(clients), "federation.num_clients") or ""
            yield from [CrossProblem("attack.clients", text)] if text else []
    for key, why in _refused(values, row, name, flags):
        yield CrossProblem(key, f"{key} does not go with attack.name: {given}, {why}")


def _refused(
    values: Mapping[str, Any], row: Any, name: str, flags: StrategyEntry
) -> Iterator[tuple[str, str]]:
    """Keys beside which an attack would not be what it says."""
    if flags.pools or flags.traffic.endswith(":nothing"):
        yield "federation.strategy", f"as {name} combines no updates of several clients"
    if lookup(values, "tasks"):
        yield "tasks", "whose clients share one data set; leave one of the two out"
    if lookup(values, "privacy.unit") is not None:
        yield "privacy.unit", "whose clients know the honest updates, which no promise allows"
    if lookup(values, "secure.aggregation") is not None:
        why = "whose clients check sizes and weights themselves, and hostile ones would not"
        yield "secure.aggregation", why
    if lookup(values, "federation.sharing.mode") not in (None, "shared"):
        yield "federation.sharing.mode", "which is of one adapter for all; use shared"
    for key in ("federation.client_ranks", "federation.client_memory_mb"):
        if lookup(values, key) is not None:
            yield key, "whose clients send tensors of one shape; leave one of the two out"
    if lookup(values, "federation.dynamic_ranks.enabled") is True:
        yield "federation.dynamic_ranks.enabled", "whose clients send all ranks; leave one out"
    poisons = row.falsifies in ("labels", "images")
    if poisons and lookup(values, "task") == "contrastive":
        yield "task", "which falsifies classes; captions have none"
    personal = flags.personal or number(values, "federation.ditto_mu") is not None
    if row.falsifies == "images" and personal:
        key = "federation.strategy" if flags.personal else "federation.ditto_mu"
        yield key, "whose success is that of one shared model"
