"""How many bytes a round of each algorithm moves, by formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Layer(NamedTuple):
    """Sides of an adapted linear layer, and its rank where that is its own."""

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
    bytes_per_value: int = 4,
    server_round: int = 1,
) -> Traffic:
    """Bytes per client of one round with `clients` participants.

    All layers have rank `rank` but those that have one of their own.

    Down is what the round's result costs for a client that has followed every round so far: it
    knows all that was sent before. Names and headers of a file are not counted. `server_round`,
    from 1, matters for RoLoRA alone. Raises ValueError for an unknown algorithm, naming the known.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algorithm!r}; known: {', '.join(ALGORITHMS)}")
    setting = _Setting(
        a=sum((layer.rank or rank) * layer.in_features for layer in layers),
        b=sum((layer.rank or rank) * layer.out_features for layer in layers),
        layers=[layer._replace(rank=layer.rank or rank) for layer in layers],
        clients=clients,
        server_round=server_round,
    )
    up, down = ALGORITHMS[algorithm](setting)
    return Traffic(up * bytes_per_value, down * bytes_per_value)


class _Setting(NamedTuple):
    a: int  # values of all A
    b: int  # values of all B
    layers: Sequence[Layer]  # with their ranks
    clients: int
    server_round: int


def _both(x: _Setting) -> tuple[int, int]:
    return x.a + x.b, x.a + x.b


def _ffa(x: _Setting) -> tuple[int, int]:
    return x.b, x.b


def _rolora(x: _Setting) -> tuple[int, int]:
    """B in odd rounds, A in even ones."""
    trained = x.b if x.server_round % 2 else x.a
    return trained, trained


def _fedsa(x: _Setting) -> tuple[int, int]:
    return x.a, x.a


def _fedsvd(x: _Setting) -> tuple[int, int]:
    """Clients train B alone, but re-orthogonalisation renews A too."""
    return x.b, x.a + x.b


def _flora(x: _Setting) -> tuple[int, int]:
    return x.a + x.b, x.clients * (x.a + x.b)


def _fedex(x: _Setting) -> tuple[int, int]:
    """The mean, and each layer's residual in factors of rank (K - 1) r or dense, if smaller."""
    others = x.clients - 1
    residuals = sum(min(others * (r or 0) * (i + o), i * o) for i, o, r in x.layers)
    return x.a + x.b, x.a + x.b + residuals


def _fed_sb(x: _Setting) -> tuple[int, int]:
    cores = sum((layer.rank or 0) ** 2 for layer in x.layers)
    return cores, cores


ALGORITHMS: dict[str, Callable[[_Setting], tuple[int, int]]] = {
    "fedit": _both,
    "fedavg": _both,
    "qfedavg": _both,
    "centralised": _both,
    "local": lambda x: (0, 0),
    "flexlora": _both,
    "hetlora": _both,
    "lora_fair": _both,
    "ffa": _ffa,
    "rolora": _rolora,
    "fedsa": _fedsa,
    "fedsvd": _fedsvd,
    "flora": _flora,
    "fedex": _fedex,
    "fed_sb": _fed_sb,
}
