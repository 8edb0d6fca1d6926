"""The rank of each client: as configured, or the largest that its memory allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from fedclip.config.federation import HIGHEST_RANK, is_distribution, shares_by_rank
from fedclip.errors import UsageError
from fedclip.federated.traffic import Layer
from fedclip.seeding import seed_for

T = TypeVar("T")

RANKS_KEY = "federation.client_ranks"
MEMORY_KEY = "federation.client_memory_mb"
DEFAULT = "default"
"""The name that speaks for all clients that are not named."""

ADAM_BYTES = 16
"""Bytes of one trained parameter in fp32: itself, its gradient and Adam's two moments."""


def client_ranks(
    spec: Sequence[int] | Mapping[str, int] | Mapping[str, float],
    client_ids: Sequence[str],
    seed: int,
) -> dict[str, int]:
    """Rank of every client, by id in sorted order.

    `spec` is that of `federation.client_ranks`. A list of ranks is dealt out evenly, [4, 8, 16] a
    third of the clients each, the first ranks once more where it does not come out even. A mapping
    of ranks to shares that sum to 1, floats, gives numbers of clients by largest remainder, the
    lower rank first where remainders are equal. Who gets which rank is drawn from the run's `seed`,
    and does not depend on the order of `client_ids`. A mapping of client ids to ranks, integers,
    must name every client, or have a `default`.

    Raises UsageError for a client that is not named, a name that no client has, a rank out of
    range, or shares that do not sum to 1.
    """
    ids = sorted(client_ids)
    if isinstance(spec, Mapping) and not is_distribution(spec):
        ranks: dict[str, Any] = by_client(spec, ids, RANKS_KEY)
    else:
        dealt = _counted(spec, len(ids)) if isinstance(spec, Mapping) else _in_turn(spec, len(ids))
        order = np.random.default_rng(seed_for(seed, "client_ranks")).permutation(len(ids))
        drawn = {ids[place]: rank for place, rank in zip(order, dealt, strict=True)}
        ranks = {client_id: drawn[client_id] for client_id in ids}
    for client_id, rank in ranks.items():
        if not (isinstance(rank, int) and 1 <= rank <= HIGHEST_RANK):
            raise UsageError(
                f"{RANKS_KEY}: the rank of {client_id} must be a whole number from 1 to "
                f"{HIGHEST_RANK}, got {rank!r}"
            )
    return ranks


def by_client(spec: Mapping[str, T], client_ids: Sequence[str], key: str) -> dict[str, T]:
    """The value of every client, `default` where it is not named; UsageError names the `key`."""
    unknown = sorted(set(spec) - set(client_ids) - {DEFAULT})
    if unknown:
        raise UsageError(
            f"{key} names {_some(unknown)}, but the clients are {_some(client_ids)}; "
            "correct the names or leave them out"
        )
    missing = [] if DEFAULT in spec else [one for one in client_ids if one not in spec]
    if missing:
        raise UsageError(f"{key} must name every client or have a {DEFAULT}: add {_some(missing)}")
    return {one: spec[one] if one in spec else spec[DEFAULT] for one in client_ids}


def rank_for_memory(
    memory_mb: float,
    *,
    layers: Sequence[Layer],
    base_bytes: int,
    activation_bytes: int,
    maximum: int = HIGHEST_RANK,
    who: str = "a client",
) -> int:
    """The largest rank, from 1 to `maximum`, with which training fits into `memory_mb` 10^6 bytes.

    What is the same for all ranks is the frozen base's weights, `base_bytes`, and the
    `activation_bytes` of a step; the little that these grow with the rank is not told apart, so
    measure them at `maximum`. A rank adds 16 bytes for each of its in + out parameters in every
    layer (fp32: weight, gradient, two moments of Adam). An allocator's slack is not counted.
    Raises UsageError, with the numbers, where rank 1 does not fit.
    """
    fixed = base_bytes + activation_bytes
    each = sum(ADAM_BYTES * (x.in_features + x.out_features) for x in layers)
    rank = math.floor((memory_mb * 1e6 - fixed) / each)
    if rank < 1:
        raise UsageError(
            f"{MEMORY_KEY}: {who} has {memory_mb:g} MB, but training takes "
            f"{base_bytes / 1e6:.1f} MB for the base model, {activation_bytes / 1e6:.1f} MB for "
            f"activations and {each / 1e6:.3f} MB for each rank; give it at least "
            f"{math.ceil((fixed + each) / 1e6)} MB, or lower data.batch_size"
        )
    return min(rank, maximum)


def ranks_for_memory(
    spec: Mapping[str, float],
    client_ids: Sequence[str],
    *,
    layers: Sequence[Layer],
    base_bytes: int,
    activation_bytes: int,
    maximum: int = HIGHEST_RANK,
) -> dict[str, int]:
    """`rank_for_memory` of every client, `spec` being that of `federation.client_memory_mb`."""
    memory = by_client(spec, sorted(client_ids), MEMORY_KEY)
    return {
        client_id: rank_for_memory(
            memory_mb,
            layers=layers,
            base_bytes=base_bytes,
            activation_bytes=activation_bytes,
            maximum=maximum,
            who=client_id,
        )
        for client_id, memory_mb in memory.items()
    }


def _in_turn(ranks: Sequence[int], clients: int) -> list[int]:
    if not ranks:
        raise UsageError(f"{RANKS_KEY} must name at least one rank, got an empty list")
    return [ranks[place % len(ranks)] for place in range(clients)]


def _counted(spec: Mapping[Any, float], clients: int) -> list[int]:
    """Each rank as often as its share says, the lowest first."""
    try:
        shares = shares_by_rank(spec)
    except ValueError as error:
        raise UsageError(f"{RANKS_KEY}: {error}") from None
    counts = {rank: math.floor(share * clients) for rank, share in shares.items()}
    # Rounded, so that equal remainders are equal; the sort keeps the lower rank first.
    remainders = {rank: round(shares[rank] * clients - counts[rank], 6) for rank in shares}
    by_remainder = sorted(remainders, key=lambda rank: -remainders[rank])
    for rank in by_remainder[: clients - sum(counts.values())]:
        counts[rank] += 1
    return [rank for rank, count in counts.items() for _ in range(count)]


def _some(names: Sequence[str]) -> str:
    """Up to three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
