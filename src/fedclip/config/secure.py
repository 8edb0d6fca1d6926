"""The `secure` section: sums of updates that nobody sees one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from fedclip.catalog import STRATEGIES, StrategyEntry
from fedclip.config.checks_data import may_be_natural
from fedclip.config.section import Count, CrossProblem, Section, lookup, number

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


def secure_problems(
    values: Mapping[str, Any], name: str, flags: StrategyEntry
) -> Iterator[CrossProblem]:
    """What does not go with masked sums, and why."""
    if lookup(values, "secure.aggregation") != "masked":
        for key in ("most_examples", "largest_change"):
            given = lookup(values, f"secure.{key}")
            if given not in (None, SecureConfig.model_fields[key].default):
                text = f"secure.{key} is for masked sums: set secure.aggregation: masked"
                yield CrossProblem(f"secure.{key}", text)
        return
    for key, why in _refused(values):
        yield CrossProblem(key, f"{key} does not go with secure.aggregation: masked, {why}")
    yield from _enough(values)
    if not flags.masks:
        those = ", ".join(sorted(n for n, row in STRATEGIES.items() if row.masks))
        own = "" if name in STRATEGIES else ", or say `masks = True` in the class if it is so"
        yield CrossProblem(
            "secure.aggregation",
            "secure.aggregation: masked shows nothing but the mean by examples, and "
            f"federation.strategy: {name} reads more than that; use it with {those}{own}",
        )


def _refused(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys that need to see single updates, or numbers of another form."""
    unseen = "where no single update is seen; leave it out"
    for key in ("robust.rule", "robust.attackers", "robust.largest_share"):
        if lookup(values, key) is not None:
            why = unseen
            if key == "robust.largest_share":
                why += ", or use secure.most_examples, which caps what a client weighs"
            yield key, why
    if lookup(values, "deploy.largest_update") is not None:
        yield "deploy.largest_update", unseen
    form = lookup(values, "deploy.up")
    if form in ("fp16", "int8"):
        yield "deploy.up", f"whose sums are of whole numbers of 32 bits, not of {form}; use fp32"
    for key in ("federation.client_ranks", "federation.client_memory_mb"):
        if lookup(values, key) is not None:
            yield key, "whose vectors are all of one length; leave it out"
    for key in ("federation.scaffold", "federation.dynamic_ranks.enabled"):
        if lookup(values, key) is True:
            yield key, unseen
    if number(values, "federation.ditto_mu") is not None:
        yield "federation.ditto_mu", unseen
    if lookup(values, "federation.sharing.mode") not in (None, "shared"):
        yield "federation.sharing.mode", "which sums over all clients of a round; use shared"
    if lookup(values, "tasks"):
        yield "tasks", "whose clients all send tensors of the same names; leave it out"
    if lookup(values, "privacy.unit") == "client":
        yield (
            "privacy.unit",
            "as its coordinator clips each client's update, which it would not see; use "
            "privacy.unit: example, whose noise is added before the masks",
        )


def _enough(values: Mapping[str, Any]) -> Iterator[CrossProblem]:
    """Of what is known before the data are."""
    drawn = lookup(values, "federation.clients_per_round")
    named = lookup(values, "deploy.sites")
    key = "federation.num_clients" if drawn is None else "federation.clients_per_round"
    clients = number(values, key)
    if drawn is None and isinstance(named, list | tuple):
        key, clients = "deploy.sites", len(named)
    elif drawn is None and may_be_natural(values):
        return
    if isinstance(clients, int) and clients < LEAST_MASKED:
        yield CrossProblem(key, few(key, clients))


def few(key: str, clients: int) -> str:
    """Why so few clients have no masked sum."""
    return (
        f"{key}: secure.aggregation: masked needs {LEAST_MASKED} clients a round at least, got "
        f"{clients}: of two, each would learn the other's update by its own"
    )
