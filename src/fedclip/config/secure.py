"""The `secure` section: sums of updates that nobody sees one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fedclip.catalog import STRATEGIES, StrategyEntry
from fedclip.config.checks_data import (
    CLIENT_KEYS,
    clients_of_a_round,
    may_be_natural,
    rank_sources,
)
from fedclip.config.robust import robust_keys
from fedclip.config.section import Count, CrossProblem, Section

if TYPE_CHECKING:
    from fedclip.config.tree import Config

LEAST_MASKED = 3
"""Clients below which a sum hides nothing: of two, each learns the other's by its own."""
USUAL_LARGEST_UPDATE = 10.0
"""`deploy.largest_update` where it is not given, without masks."""


class SecureConfig(Section):
    """Secure aggregation; the page on masked sums says what it promises, and what not."""

    aggregation: Literal["masked"] | None = Field(
        None,
        description="`masked`: updates are summed behind masks, and only the sum is seen; with "
        "the mean by examples alone. `null`: the coordinator sees each update.",
    )
    most_examples: Count | None = Field(
        None,
        description="A client with more examples weighs as one with so many; `null`: no cap.",
    )
    largest_change: Annotated[float, Field(ge=1e-6, le=10_000)] = Field(
        1.0,
        description="The most by which a client may change a number in a round; one that changes "
        "more is left out. Less is more exact.",
    )

    @property
    def masked(self) -> bool:
        """Whether updates are masked."""
        return self.aggregation == "masked"


def secure_problems(config: Config, flags: StrategyEntry) -> Iterator[CrossProblem]:
    """What does not go with masked sums, and why."""
    name, usual = config.federation.strategy, SecureConfig()
    if not config.secure.masked:
        for key in ("most_examples", "largest_change"):
            if getattr(config.secure, key) != getattr(usual, key):
                text = f"secure.{key} is for masked sums: set secure.aggregation: masked"
                yield CrossProblem(f"secure.{key}", text, ("secure.aggregation",))
        return
    for key, why in _refused(config):
        yield CrossProblem(key, f"{key} does not go with secure.aggregation: masked, {why}")
    yield from _enough(config)
    if not flags.masks:
        those = ", ".join(sorted(n for n, row in STRATEGIES.items() if row.masks))
        own = "" if name in STRATEGIES else ", or say `masks = True` in the class if it is so"
        yield CrossProblem(
            "secure.aggregation",
            "secure.aggregation: masked shows nothing but the mean by examples, and "
            f"federation.strategy: {name} reads more than that; use it with {those}{own}",
        )


def _refused(config: Config) -> Iterator[tuple[str, str]]:
    """Keys that need to see single updates, or numbers of another form."""
    federation, form = config.federation, config.deploy.up
    unseen = "where no single update is seen; leave it out"
    for key in robust_keys(config.robust):
        cap = ", or use secure.most_examples, which caps what a client weighs"
        yield key, unseen + (cap if key == "robust.largest_share" else "")
    if config.deploy.largest_update is not None:
        yield "deploy.largest_update", unseen
    if form != "fp32":
        yield "deploy.up", f"whose sums are of whole numbers of 32 bits, not of {form}; use fp32"
    for key in rank_sources(config):
        yield key, "whose vectors are all of one length; leave it out"
    others = {
        "federation.scaffold": federation.scaffold,
        "federation.dynamic_ranks.enabled": federation.dynamic_ranks.enabled,
        "federation.ditto_mu": federation.ditto_mu is not None,
    }
    for key in (key for key, given in others.items() if given):
        yield key, unseen
    if federation.sharing.mode != "shared":
        yield "federation.sharing.mode", "which sums over all clients of a round; use shared"
    if config.tasks:
        yield "tasks", "whose clients all send tensors of the same names; leave it out"
    if config.privacy.unit == "client":
        yield (
            "privacy.unit",
            "as its coordinator clips each client's update, which it would not see; use "
            "privacy.unit: example, whose noise is added before the masks",
        )


def _enough(config: Config) -> Iterator[CrossProblem]:
    """Of what is known before the data are."""
    key, clients = clients_of_a_round(config)
    if key == "federation.num_clients" and may_be_natural(config):
        return
    if isinstance(clients, int) and clients < LEAST_MASKED:
        yield CrossProblem(key, few(key, clients), CLIENT_KEYS)


def few(key: str, clients: int) -> str:
    """Why so few clients have no masked sum."""
    return (
        f"{key}: secure.aggregation: masked needs {LEAST_MASKED} clients a round at least, got "
        f"{clients}: of two, each would learn the other's update by its own"
    )
