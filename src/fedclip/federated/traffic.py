"""How many bytes a round of each algorithm moves, by formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fedclip.catalog import STRATEGIES, target_of


class Layer(NamedTuple):
    """Sides of an adapted linear layer, and its rank where that differs."""

    in_features: int
    out_features: int
    rank: int | None = None


class Traffic(NamedTuple):
    """Bytes one client sends, and bytes of the round's result that one client receives."""

    up: int
    down: int


def bytes_per_round(
    algorithm: str,
    layers: Sequence[Layer],
    rank: int,
    clients: int,
    *,
    rest: int = 0,
    bytes_per_value: int = 4,
    server_round: int = 1,
) -> Traffic:
    """Bytes per client of one round with `clients` participants.

    All layers have rank `rank` but those that have one of their own; `rest` counts the trained
    values outside of them, such as a head's.

    Down is what the round's result costs for a client that has followed every round so far: it
    knows all that was sent before. Names and headers of a file are not counted. `server_round`,
    from 1, matters for RoLoRA alone. Raises ValueError for an unknown algorithm, naming the known.
    """
    if algorithm not in STRATEGIES:
        raise ValueError(f"unknown algorithm {algorithm!r}; known: {', '.join(STRATEGIES)}")
    return by_formula(
        STRATEGIES[algorithm].traffic,
        layers,
        rank,
        clients,
        rest=rest,
        bytes_per_value=bytes_per_value,
        server_round=server_round,
    )


def by_formula(
    formula: str,
    layers: Sequence[Layer],
    rank: int,
    clients: int,
    *,
    rest: int = 0,
    bytes_per_value: int = 4,
    server_round: int = 1,
) -> Traffic:
    """The same by a formula, named as `module:function` in the catalogue's `traffic`."""
    sizes = Sizes(
        a=sum((layer.rank or rank) * layer.in_features for layer in layers),
        b=sum((layer.rank or rank) * layer.out_features for layer in layers),
        rest=rest,
        layers=[layer._replace(rank=layer.rank or rank) for layer in layers],
        clients=clients,
        server_round=server_round,
    )
    up, down = target_of(formula)(sizes)
    return Traffic(up * bytes_per_value, down * bytes_per_value)


class Sizes(NamedTuple):
    """What a formula counts: numbers of trained values, of a round of so many clients."""

    a: int  # values of all A
    b: int  # values of all B
    rest: int  # values that belong to no layer, such as a head's
    layers: Sequence[Layer]  # with their ranks
    clients: int
    server_round: int


def both(x: Sizes) -> tuple[int, int]:
    """All that is trained, up and down."""
    return x.a + x.b + x.rest, x.a + x.b + x.rest


def nothing(x: Sizes) -> tuple[int, int]:
    """Nothing travels."""
    return 0, 0


def only_a(x: Sizes) -> tuple[int, int]:
    """A alone: all else stays with its client."""
    return x.a, x.a


def only_b(x: Sizes) -> tuple[int, int]:
    """All but A, which is fixed."""
    return x.b + x.rest, x.b + x.rest


def in_turns(x: Sizes) -> tuple[int, int]:
    """B in odd rounds, A in even ones."""
    trained = (x.b if x.server_round % 2 else x.a) + x.rest
    return trained, trained


def b_up_both_down(x: Sizes) -> tuple[int, int]:
    """Clients train B alone, but re-orthogonalisation renews A too."""
    return x.b + x.rest, x.a + x.b + x.rest


def stacked(x: Sizes) -> tuple[int, int]:
    """All clients' factors come down, one upon the other."""
    return x.a + x.b + x.rest, x.clients * (x.a + x.b) + x.rest


def mean_and_residual(x: Sizes) -> tuple[int, int]:
    """The mean, and each layer's residual in factors of rank (K - 1) r or dense, if smaller."""
    others = x.clients - 1
    residuals = sum(min(others * (r or 0) * (i + o), i * o) for i, o, r in x.layers)
    return x.a + x.b + x.rest, x.a + x.b + x.rest + residuals


def cores(x: Sizes) -> tuple[int, int]:
    """A square core of each layer."""
    numbers = sum((layer.rank or 0) ** 2 for layer in x.layers) + x.rest
    return numbers, numbers
