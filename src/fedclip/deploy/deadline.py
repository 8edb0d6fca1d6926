"""A deadline that holds also while a reply is on its way.

Flower announces a reply before its pieces have been sent. Its grid then waits for them, up to three
minutes after the sender was killed or cut off, whatever timeout `send_and_receive` was given.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replies_until(deadline: float) -> Iterator[None]:
    """Within it, Flower's grid gives a reply up whose pieces have not come by the deadline.

    `deadline` is a moment of `time.monotonic()`. The reply then is one with an error in it, for the
    message that was asked; replies that are complete by then are had in any case.
    """
    from flwr.superlink.grid import http_grid

    usual = http_grid.pull_objects

    def pull(object_ids: list[str], pull_object_fn: Any, **more: Any) -> dict[str, bytes]:
        left = max(deadline - time.monotonic(), 0.0)
        return usual(object_ids, pull_object_fn, **{"max_time": left, "backoff_cap": 1.0, **more})

    http_grid.pull_objects = pull
    try:
        yield
    finally:
        http_grid.pull_objects = usual
