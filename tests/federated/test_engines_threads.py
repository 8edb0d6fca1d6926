"""Threads with clients of their own: the same work as in one, dealt out evenly."""

import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedclip.errors import TrainingFailed
from fedclip.federated.engines import threads as side_by_side
from fedclip.federated.engines.batched import BatchedEngine
from fedclip.federated.engines.threads import LOPSIDED, deal, together
from fedclip.federated.local_steps import LocalSettings
from fedclip.records import ClientReport, Cohort
from tests.federated.test_engines_strategies import CASES
from tests.federated.test_engines_strategies import SIZES as FEW
from tests.support.engines import BOTH, difference, rounds

UNEVEN = {"a": 12, "b": 20, "c": 5, "d": 20, "e": 1}
EVEN = {"a": 23, "b": 40, "c": 21, "d": 40, "e": 9}


@pytest.fixture(autouse=True)
def threads():
    """torch's threads are the whole process's: what a test leaves must be what it found."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.fixture
def always(monkeypatch):
    """Even what is lopsided is dealt out, two clients a pass."""
    monkeypatch.setattr(side_by_side, "LOPSIDED", 100.0)
    monkeypatch.setattr(side_by_side, "IMAGES", 16)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout": 0.2, "targets": BOTH},
        {"head": "linear", "group_size": 4},
        {"cached": True, "last": 1},
        {"ranks": {"a": 2, "d": 1}},
    ],
    ids=str,
)
def test_threads_change_nothing(options, always):
    settings = LocalSettings(batch_size=8, local_epochs=2, learning_rate=1e-3, schedule="cosine")
    options = {"count": 2, "sizes": UNEVEN, "dtype": torch.float64} | options
    one = rounds("side by side", settings, **options)
    other = rounds("batched", settings, **options)
    assert difference(one, other) <= 1e-9
    assert [r.client_id for r in one.reports] == [r.client_id for r in other.reports]
    assert [r.loss for r in one.reports] == pytest.approx([r.loss for r in other.reports], rel=1e-9)


def test_threads_change_little_in_float32(always):
    settings = LocalSettings(batch_size=8, local_epochs=2, learning_rate=1e-3)
    one, other = (
        rounds(kind, settings, name="random:tiny", targets=BOTH)
        for kind in ("side by side", "sequential")
    )
    assert difference(one, other) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_threads_do_what_strategies_ask(case, always):
    strategy, settings = CASES[case]
    kw = {"count": 2, "sizes": FEW, "strategy": strategy, "targets": BOTH, "dtype": torch.float64}
    one = rounds("side by side", settings, **kw)
    assert difference(one, rounds("batched", settings, **kw)) <= 1e-9


@pytest.mark.parametrize("kind", ["batched", "side by side", "static"])
def test_the_clients_steps_are_heard_one_by_one(kind, always):
    """Of 23, 40, 9, 40 and 1 examples in batches of 8, twice: 2 * (3 + 5 + 2 + 5 + 1) steps."""
    heard, settings = [], LocalSettings(batch_size=8, local_epochs=2)
    static = kind == "static"
    rounds(
        "batched" if static else kind,
        settings,
        static=static,
        on_steps=lambda done, total: heard.append((done, total)),
    )
    assert {total for _, total in heard} == {32}
    assert sorted(heard)[-1] == (32, 32)
    assert len(heard) >= 10
    assert len(set(heard)) == len(heard)


def test_the_same_bytes_each_time():
    settings = LocalSettings(batch_size=8, learning_rate=1e-2)
    one, other = (
        rounds("side by side", settings, sizes=EVEN, dropout=0.1, count=2) for _ in range(2)
    )
    for name, tensor in one.state.shared.items():
        assert torch.equal(tensor, other.state.shared[name]), name


@pytest.mark.parametrize("late", ["_0", "_1"])
def test_the_client_named_in_a_failure_is_the_same_whichever_thread_is_first(
    late, always, monkeypatch
):
    def slow(self, *args):
        if threading.current_thread().name.endswith(late):
            time.sleep(0.05)
        return whole(self, *args)

    whole = BatchedEngine._loss
    monkeypatch.setattr(BatchedEngine, "_loss", slow)
    settings = LocalSettings(batch_size=8, learning_rate=1e30, max_grad_norm=None, optimizer="sgd")
    with pytest.raises(TrainingFailed, match="client b, round 1"):
        rounds("side by side", settings)


def test_an_interruption_is_not_kept_waiting(always, monkeypatch):
    """A thread is told to stop, and does so at its next step."""
    steps = []

    def interrupted(self, *arguments):
        steps.append(threading.current_thread().name)
        if len(steps) == 3:
            raise KeyboardInterrupt
        time.sleep(0.05)
        return whole(self, *arguments)

    whole = BatchedEngine._loss
    monkeypatch.setattr(BatchedEngine, "_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rounds("side by side", LocalSettings(batch_size=1, local_epochs=50))
    assert len(steps) < 20  # of thousands


def test_dealt_by_hand():
    sizes = {"a": 5, "b": 4, "c": 3, "d": 3, "e": 1}
    assert deal("abcde", sizes, 2) == [("a", "d"), ("b", "c", "e")]
    assert deal("abcde", sizes, 1) is None
    assert deal("ab", {"a": 10, "b": 1}, 2) is None  # a thread would idle most of the time


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 4))
def test_whatever_is_dealt_is_fair_and_whole(numbers, hands):
    sizes = {str(i): n for i, n in enumerate(sorted(numbers, reverse=True))}
    parts = deal(list(sizes), sizes, hands)
    if parts is not None:
        assert sorted(c for part in parts for c in part) == sorted(sizes)
        loads = [sum(sizes[c] for c in part) for part in parts]
        assert max(loads) * hands <= LOPSIDED * sum(numbers)


def test_seconds_are_those_on_the_clock():
    def cohort(client_id, steps):
        report = ClientReport(client_id, 8, 0.5, steps, 99.0)
        return Cohort((report,), {"x": torch.tensor([[float(steps)]])})

    whole = together("ab", [cohort("b", 1), cohort("a", 3)], 2.0)
    assert [(r.client_id, r.seconds) for r in whole.reports] == [("a", 1.5), ("b", 0.5)]
    assert whole.tensors["x"].tolist() == [[3.0], [1.0]]


def test_sizes_of_the_tests_are_lopsided_or_not():
    """So that both ways are taken above."""
    assert deal(sorted(EVEN, key=EVEN.get, reverse=True), EVEN, 2) is not None
    assert deal(sorted(FEW, key=FEW.get, reverse=True), FEW, 2) is None
