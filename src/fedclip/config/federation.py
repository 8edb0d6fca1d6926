"""The `federation` section: rounds, clients, the strategy, ranks and who shares an adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fedclip.config.section import (
    AsTuple,
    Fraction,
    Megabytes,
    Named,
    OwnWeight,
    PartShare,
    Rate,
    Section,
    Share,
    Text,
    Times,
    Weight,
)

HIGHEST_RANK = 64
"""The highest rank an adapter may have, here and in `model.lora.r`."""

Rank = Annotated[int, Field(ge=1, le=HIGHEST_RANK)]


def is_distribution(spec: Mapping[str, int | float]) -> bool:
    """Whether a mapping divides clients by shares (`{4: 0.5}`), not by name (`{client-0: 4}`)."""
    return any(isinstance(value, float) for value in spec.values())


def _text_keys(spec: Any) -> Any:
    """A rank as key is text in YAML's mappings, and may be a number in Python's."""
    return {str(k): v for k, v in spec.items()} if isinstance(spec, Mapping) else spec


def shares_by_rank(spec: Mapping[Any, float]) -> dict[int, float]:
    """Shares by rank, as a number, the lowest first; ValueError unless they are shares of 1."""
    ranks = {str(rank): rank for rank in range(1, HIGHEST_RANK + 1)}
    for key, share in spec.items():
        if str(key) not in ranks:
            raise ValueError(f"shares must be those of ranks from 1 to {HIGHEST_RANK}, got {key!r}")
        if not 0 < share <= 1:
            raise ValueError(f"the share of rank {key} must be above 0 and at most 1, got {share}")
    total = math.fsum(spec.values())
    if abs(total - 1) > 1e-6:
        raise ValueError(f"the shares of the ranks must sum to 1, got {total:g}; change a share")
    return dict(sorted((ranks[str(key)], share / total) for key, share in spec.items()))


def _check_shares(spec: Any) -> Any:
    if isinstance(spec, Mapping) and is_distribution(spec):
        shares_by_rank(spec)
    return spec


ClientRanks = Annotated[
    Annotated[tuple[Rank, ...], AsTuple, Field(min_length=1)]
    | Annotated[dict[Text, Rank], Field(min_length=1)]
    | Annotated[dict[Text, Share], Field(min_length=1)]
    | None,
    BeforeValidator(_text_keys),
    AfterValidator(_check_shares),
]
ClientMemory = Annotated[
    Annotated[dict[Text, Megabytes], Field(min_length=1)] | None,
    BeforeValidator(_text_keys),
]

CLIENT_RANKS = Field(
    None,
    description="Ranks of the clients: a list, dealt out evenly; by client id, `default` for all "
    "others; or the share of clients for each rank. `null`: all have `model.lora.r`.",
    json_schema_extra={
        "expected": "a list of ranks, a mapping of client ids (or `default`) to ranks, a mapping "
        f"of ranks to shares that sum to 1 (ranks from 1 to {HIGHEST_RANK}), or null"
    },
)
CLIENT_MEMORY = Field(
    None,
    description="Memory for training, in MB (10^6 bytes), by client id, `default` for all others: "
    "a client gets the largest rank that fits. `null`: memory does not limit ranks.",
    json_schema_extra={"expected": "a mapping of client ids (or `default`) to megabytes, or null"},
)


class DynamicRankConfig(Section):
    """Ranks that the server chooses anew for each layer during the run."""

    enabled: bool = Field(False, description="Let ranks change; `false` keeps `model.lora.r`.")
    schedule: Literal["energy", "importance"] = Field(
        "energy",
        description="`energy`: the least rank that keeps the share `energy` of a layer's update; "
        "`importance`: a budget that falls over the run goes to the layers that change most.",
    )
    energy: Share = Field(0.9, description="Share of a layer's squared singular values to keep.")
    budget: Share = Field(
        0.6,
        description="Mean rank of the layers at most, as a share of what `model.lora.r` and "
        "`rank_pattern` give them.",
    )
    minimum: Rank = Field(1, description="Least rank of a layer, if it has as much.")
    every: Times = Field(1, description="Ranks may change every so many rounds.")
    warmup: Fraction = Field(
        0.1, description="Share of the rounds, at the start, in which ranks stay as they are."
    )
    cooldown: Fraction = Field(
        0.2, description="Share of the rounds, at the end, in which ranks stay as they are."
    )
    hysteresis: Fraction = Field(
        0.05,
        description="How far, as a share of `energy`, a layer's rank may be off before it changes.",
    )

    @model_validator(mode="after")
    def _some_rounds_are_left(self) -> DynamicRankConfig:
        if self.warmup + self.cooldown >= 1:
            raise ValueError(
                f"warmup ({self.warmup}) and cooldown ({self.cooldown}) leave no round in which "
                "ranks may change; their sum must be less than 1"
            )
        return self


class SharingConfig(Section):
    """Which clients train one adapter together."""

    mode: Literal["shared", "per_task", "shared+task", "clusters"] = Field(
        "shared",
        description="`shared`: one adapter for all; `per_task`: one for each task; `shared+task`: "
        "the first ranks for all, the rest for each task; `clusters`: one for each group of "
        "clients whose updates are alike.",
    )
    shared_rank: Rank | None = Field(
        None,
        description="Ranks that all tasks share (shared+task); `null` takes half of `lora.r`.",
    )
    clusters: Annotated[int, Field(ge=2, le=1_000_000)] | None = Field(
        None,
        description="Groups to be found (clusters); `null` takes the number from 2 to 10 that "
        "tells them apart best, by the silhouette.",
    )
    cluster_round: Times = Field(
        1,
        description="Round after which groups are found, in which all clients take part "
        "(clusters).",
    )
    merge: Annotated[str, AfterValidator(Named("merge_methods"))] = Field(
        "svd",
        description="How `adapter/` is made of the groups' own at the end; see `fedclip merge`.",
    )


class ServerOptimizerConfig(Section):
    """The server's step along what the strategy proposes (Reddi et al. 2021, arXiv:2003.00295)."""

    name: Annotated[str, AfterValidator(Named("server_optimizers", also=("none",)))] = Field(
        "none", description="`none` takes what the strategy proposes; else FedAvgM, FedAdam, ..."
    )
    learning_rate: Rate = Field(
        0.01, description="The server's rate; FedAvgM wants about 1, the others far less."
    )
    beta1: Fraction = Field(0.9, description="Momentum.")
    beta2: Fraction = Field(0.99, description="Memory of squares (adam, yogi).")
    tau: Rate = Field(
        1e-3, description="Added to the root of the squares, which start at its square (not avgm)."
    )


class FederationConfig(Section):
    """Rounds, clients and how their updates are combined."""

    strategy: Annotated[str, AfterValidator(Named("strategies"))] = Field(
        "fedavg",
        description="How updates become the next global state; see the page on strategies. "
        "`path/to/file.py:Name` is a class of your own.",
    )
    rounds: Times = Field(10, description="Rounds of the run.")
    num_clients: Times = Field(
        10, description="Clients; with natural sites, the sites say how many."
    )
    clients_per_round: Times | PartShare | None = Field(
        None,
        description="Clients drawn for a round: a number or a share; `null` takes all.",
        json_schema_extra={
            "expected": "a whole number >= 1 (clients), a share between 0 and 1, or null (all)"
        },
    )
    client_ranks: ClientRanks = CLIENT_RANKS
    client_memory_mb: ClientMemory = CLIENT_MEMORY
    dynamic_ranks: DynamicRankConfig = Field(
        DynamicRankConfig(), description="Ranks that change during the run."
    )

    sharing: SharingConfig = Field(SharingConfig(), description="Who trains together.")
    server_optimizer: ServerOptimizerConfig = Field(
        ServerOptimizerConfig(), description="The server's optimizer."
    )
    scaffold: bool = Field(
        False, description="Control variates against client drift (SCAFFOLD); for plain SGD."
    )
    ditto_mu: OwnWeight | None = Field(
        None,
        description="Also train a personal model for each client, pulled to the shared one with "
        "this weight (Ditto); `null` trains none.",
    )
    q: Annotated[float, Field(ge=0, le=100)] = Field(
        1.0, description="How much more a client of high loss weighs (qfedavg)."
    )
    ridge: Weight = Field(
        1.0,
        description="How much LoRA-FAIR's correction is held back: about 1 / (1 + ridge) of the "
        "unregularised one is kept (lora_fair).",
    )
    average_owners: bool = Field(
        False, description="Average a row over the clients that hold it (hetlora, flexlora)."
    )
    order_rows: bool = Field(
        True, description="Turn the mean so that lower ranks get what matters most (hetlora)."
    )
