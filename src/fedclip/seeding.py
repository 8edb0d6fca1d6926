"""Named seeds: the only source of randomness in a run."""

from __future__ import annotations

import hashlib


class ExampleKey(int):
    """A key that dropout of one example by itself is drawn by, in the way that suits many at once.

    A number like others, but for its type: engines that run examples one by one mark it so.
    """


def seed_for(run_seed: int, *names: str | int) -> int:
    """Seed of one named draw, an integer in [0, 2**63).

    The same run seed and names give the same seed everywhere, and different names give
    independent ones, so no draw depends on which others were made before it:
    `seed_for(7, "client", server_round, client_id)`.
    """
    # The separator cannot occur in a number, and lengths keep ("ab", "c") and ("a", "bc") apart.
    text = "/".join(f"{len(str(part))}:{part}" for part in (run_seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
