"""The `robust` section: clients whom one does not trust, and what one of them may weigh."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from fedclip.catalog import STRATEGIES, StrategyEntry, rows_without
from fedclip.config.checks_data import CLIENT_KEYS, clients_of_a_round
from fedclip.config.lookup import load
from fedclip.config.section import CrossProblem, Named, PartShare, Section

if TYPE_CHECKING:
    from fedclip.config.tree import Config

DEFAULT_RULE = "multi_krum"


class RobustConfig(Section):
    """Aggregation that bears hostile clients; a round's updates are then held in memory."""

    rule: Annotated[str, AfterValidator(Named("robust_rules"))] | None = Field(
        None,
        description="How updates are combined instead of their mean by examples; see the page on "
        "robust rules. `null`: multi_krum where `attackers` is given, else no rule.",
    )
    attackers: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="How many of a round's clients may be hostile."
    )
    mixing: bool = Field(
        False,
        description="Before the rule, each update becomes the mean of those nearest to it "
        "(nearest-neighbour mixing).",
    )
    largest_share: PartShare | None = Field(
        None,
        description="The largest share of a round's weights that one client may have, whatever "
        "its number of examples; without a rule, which does not weigh by examples. `null`: no cap.",
    )

    @property
    def chosen(self) -> str | None:
        """The rule by name, None where there is none."""
        return self.rule or (None if self.attackers is None else DEFAULT_RULE)

    @property
    def least(self) -> int:
        """The fewest clients of a round that the rule needs."""
        if self.chosen is None or self.attackers is None:
            return 1
        return least_clients(self.chosen, self.attackers)


def least_clients(rule: str, attackers: int) -> int:
    """The fewest clients among which a rule bears so many hostile ones; `2 f + 1` of a user's."""
    known = _known(rule)
    return 2 * attackers + 1 if known is None else int(known.least(attackers))


def _known(rule: str) -> Any:
    """A built-in rule by name; None for any other, which is not imported here."""
    return load("robust_rules", rule) if rule in rows_without("robust_rules") else None


def too_few(rule: str, attackers: int, clients: int, key: str) -> str | None:
    """Why a rule cannot bear so many hostile clients among a round's; None where it can."""
    needed = least_clients(rule, attackers)
    if clients >= needed:
        return None
    most = max(0, (clients - 1) // 2)
    family = "a rule of the Krum family needs 2 f + 3 clients a round, the others 2 f + 1"
    remedy = f"; among {clients} the others bear {most}" if most else "; 3 clients bear one at best"
    return (
        f"robust.attackers: {rule} needs {needed} clients a round for {attackers} hostile ones, "
        f"and {key} gives {clients}: {family}{remedy}"
    )


def robust_keys(robust: RobustConfig) -> list[str]:
    """The keys given that need to see single updates, or weigh them."""
    keys = ("rule", "attackers", "largest_share")
    return [f"robust.{key}" for key in keys if getattr(robust, key) is not None]


def robust_problems(config: Config, flags: StrategyEntry) -> Iterator[CrossProblem]:
    """What a robust rule or a capped share does not go with, and why."""
    robust = config.robust
    if robust.chosen is None:
        for problem in _without_rule(config, flags):
            yield problem.on("robust.rule", "robust.attackers")
        return
    if robust.attackers is None:
        text = f"robust.attackers must say how many hostile clients robust.rule: {robust.rule} is "
        yield CrossProblem("robust.attackers", text + "to bear")
    if robust.largest_share is not None:
        yield CrossProblem(
            "robust.largest_share",
            "robust.largest_share caps weights by examples, by which robust.rule does not weigh; "
            "use one of the two",
        )
    yield from _fits_strategy(config, robust.chosen, flags)
    yield from _enough(config, robust.chosen)
    yield from _around(config, "robust.rule")


def _fits_strategy(config: Config, rule: str, flags: StrategyEntry) -> Iterator[CrossProblem]:
    name = config.federation.strategy
    sound = flags.robust_mean or (flags.averages and config.model.no_lora is not None)
    weighs = not getattr(_known(rule), "coordinates", False)
    if sound or (weighs and flags.robust_weights):
        return
    whole = sorted(n for n, row in STRATEGIES.items() if row.robust_mean)
    more = sorted(n for n, row in STRATEGIES.items() if row.robust_weights)
    use = ", ".join([*whole, *(more if weighs else [])])
    why = (
        "a client that sends (B t, A / t) leaves its product B A as it is and ruins a mean of "
        "factors, so that no rule on updates helps"
        if not flags.robust_weights
        else "the median of numbers needs one factor that all clients share"
    )
    yield CrossProblem(
        "robust.rule",
        f"robust.rule: {rule} does not go with federation.strategy: {name}: {why}; use {use}, or "
        f"a linear head alone with fedavg{_say('robust_mean', name)}",
        ("model.lora.enabled", "model.lora.target_modules"),
    )


def _enough(config: Config, rule: str) -> Iterator[CrossProblem]:
    """Of what is known before the data are; a share of the clients, and sites, come later."""
    key, clients = clients_of_a_round(config)
    sites = config.data.partition.name in ("natural", "auto")
    if config.robust.attackers is None or not isinstance(clients, int):
        return
    if key == "federation.num_clients" and sites:
        return
    if (text := too_few(rule, config.robust.attackers, clients, key)) is not None:
        yield CrossProblem("robust.attackers", text, ("robust.rule", *CLIENT_KEYS))


def _around(config: Config, key: str) -> Iterator[CrossProblem]:
    """What reads single updates beside the rule, or weights them differently."""
    federation = config.federation
    around = {
        "federation.scaffold": federation.scaffold,
        "federation.dynamic_ranks.enabled": federation.dynamic_ranks.enabled,
        "federation.sharing.mode": federation.sharing.mode != "shared",
    }
    for other in (other for other, given in around.items() if given):
        text = f"{other} reads each client's update, past {key}; leave one of the two out"
        yield CrossProblem(other, text)


def _without_rule(config: Config, flags: StrategyEntry) -> Iterator[CrossProblem]:
    if config.robust.mixing:
        yield CrossProblem("robust.mixing", "robust.mixing goes before a rule: set robust.rule")
    if config.robust.largest_share is None:
        return
    name = config.federation.strategy
    if not _by_examples(flags):
        those = sorted(n for n, row in STRATEGIES.items() if _by_examples(row))
        yield CrossProblem(
            "robust.largest_share",
            f"robust.largest_share caps weights by examples, by which {name} does not weigh alone; "
            f"use it with {', '.join(those)}{_say('averages', name)}",
        )
    yield from _around(config, "robust.largest_share")


def _say(flag: str, name: str) -> str:
    """How a class that has no row says that a check is not for it."""
    return "" if name in STRATEGIES else f", or say `{flag} = True` in the class if it is so"


def _by_examples(flags: StrategyEntry) -> bool:
    return flags.averages or flags.robust_mean or flags.robust_weights
