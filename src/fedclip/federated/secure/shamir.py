"""Shamir's secret sharing: any `threshold` shares give the secret, fewer say nothing of it.

Shamir 1979 (CACM 22). Secrets are 32 bytes, shares are values of a random polynomial over the
integers modulo a prime just above 2^256, all of one length.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, places: Sequence[int], threshold: int) -> list[bytes]:
    """One share for each place; places are different numbers from 1."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, got {len(secret)}")
    if not 1 <= threshold <= len(places) or len(set(places)) < len(places) or min(places) < 1:
        raise ValueError(f"{threshold} of {len(places)} shares, at places {list(places)[:5]}")
    rest = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    polynomial = [*rest, int.from_bytes(secret, "big")]  # the highest power first
    return [_value(polynomial, place).to_bytes(SHARE_BYTES, "big") for place in places]


def is_share(data: object) -> bool:
    """Whether bytes may be a share."""
    sized = isinstance(data, bytes) and len(data) == SHARE_BYTES
    return sized and int.from_bytes(data, "big") < PRIME  # type: ignore[arg-type]


def combine(shares: Sequence[Mapping[int, bytes]]) -> list[bytes]:
    """Secrets of which shares lie at the same places, by place; as many as the threshold or more.

    Raises ValueError where the shares belong to no secret.
    """
    places = sorted(shares[0]) if shares else []
    factors = _lagrange(places)
    found = []
    for one in shares:
        if sorted(one) != places or not all(map(is_share, one.values())):
            raise ValueError("shares of different places, or none that can be")
        terms = (f * int.from_bytes(one[x], "big") for x, f in zip(places, factors, strict=True))
        value = sum(terms) % PRIME
        if value >> (8 * SECRET_BYTES):
            raise ValueError("the shares do not belong together")
        found.append(value.to_bytes(SECRET_BYTES, "big"))
    return found


def _value(polynomial: Sequence[int], place: int) -> int:
    value = 0
    for coefficient in polynomial:
        value = (value * place + coefficient) % PRIME
    return value


def _lagrange(places: Sequence[int]) -> list[int]:
    """The weight of each share in the polynomial's value at 0."""
    factors = []
    for own in places:
        above = below = 1
        for other in places:
            if other != own:
                above = above * other % PRIME
                below = below * (other - own) % PRIME
        factors.append(above * pow(below, -1, PRIME) % PRIME)
    return factors
