"""The deadline of a reply that is on its way, with Flower's own way of pulling its pieces."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest

from fedclip.deploy.deadline import replies_until

utils = pytest.importorskip("flwr.supercore.inflatable.inflatable_utils")


class Pieces:
    """Two pieces, of which the second comes after some time, if at all."""

    def __init__(self, after: float) -> None:
        self.there = time.monotonic() + after

    def pull(self, name: str) -> bytes:
        if name == "late" and time.monotonic() < self.there:
            raise utils.ObjectUnavailableError(name)
        return name.encode()


def pull(after: float) -> object:
    from flwr.superlink.grid import http_grid

    return http_grid.pull_objects(["early", "late"], Pieces(after).pull)


def test_what_is_there_is_had_even_after_the_deadline() -> None:
    with replies_until(time.monotonic() - 5):
        assert pull(0) == {"early": b"early", "late": b"late"}


def test_what_comes_in_time_is_waited_for() -> None:
    with replies_until(time.monotonic() + 20):
        assert pull(0.3) == {"early": b"early", "late": b"late"}


def test_what_does_not_come_is_given_up() -> None:
    start = time.monotonic()
    with replies_until(start + 0.5), pytest.raises(utils.ObjectPullError):
        pull(60)
    assert 0.5 <= time.monotonic() - start < 5


def test_afterwards_flower_is_as_before() -> None:
    from flwr.superlink.grid import http_grid

    before = http_grid.pull_objects
    with suppress(RuntimeError), replies_until(0):
        assert http_grid.pull_objects is not before
        raise RuntimeError
    assert http_grid.pull_objects is before
