"""Steps of static shapes do the same work, and could be captured: nothing waits for the host."""

import warnings

import hypothesis as h
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fedclip.errors import FedclipWarning
from fedclip.federated.engines import cuda_graphs as graphs_module
from fedclip.federated.engines.cuda_graphs import Graphs
from fedclip.federated.engines.gradient_terms import GradientTerms
from fedclip.federated.engines.static import Room
from fedclip.federated.engines.work import Work, halves, micro_steps
from fedclip.federated.local_steps import LocalSettings, plan_steps
from fedclip.models.dropout import counted, keep_scale
from fedclip.models.stacked import clients as stacked_clients
from fedclip.models.stacked.clients import StackedClients
from fedclip.records import TrainRequest
from fedclip.seeding import seed_for
from tests.federated.test_engines_strategies import CASES
from tests.federated.test_engines_strategies import SIZES as FEW
from tests.support.engines import BOTH, CPU, build, create, data, difference, rounds

RATES = {"lora_B": 4.0, "vision_encoder": 0.5, "head": 0.0}


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"local_epochs": 2, "schedule": "cosine"}, {"targets": BOTH, "dropout": 0.2}),
        ({"accumulation_steps": 3, "max_grad_norm": 0.01}, {"targets": BOTH}),
        ({"proximal_mu": 0.3, "rate_pattern": RATES}, {"head": "linear", "group_size": 2}),
        ({"optimizer": "sgd", "learning_rate": 0.1}, {"ranks": {"a": 1, "d": 2}}),
        ({"augment": "affine", "accumulation_steps": 2}, {"group_size": 3}),
        ({"weight_decay": 0.9, "optimizer": "sgd"}, {"head": "linear"}),
        ({"local_epochs": 2}, {"last": 1, "cached": True, "checkpointing": True}),
    ],
    ids=str,
)
def test_static_steps_equal_one_client_after_another(change, options):
    settings = LocalSettings(**{"batch_size": 8} | change)
    ours = {"dtype": torch.float64} | options
    theirs = {name: value for name, value in ours.items() if name not in ("cached", "group_size")}
    one = rounds("batched", settings, static=True, **ours)
    other = rounds("sequential", settings, **theirs)
    assert difference(one, other) <= 1e-9
    for mine, reference in zip(one.reports, other.reports, strict=True):
        assert (mine.client_id, mine.steps) == (reference.client_id, reference.steps)
        assert mine.loss == pytest.approx(reference.loss, rel=1e-9)
        assert mine.rate_sum == pytest.approx(reference.rate_sum, rel=1e-12)


@h.settings(max_examples=5, deadline=None, derandomize=True)
@h.given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    batch_size=st.integers(1, 5),
    accumulation_steps=st.integers(1, 3),
    group_size=st.integers(1, 4),
    options=st.fixed_dictionaries(
        {
            "targets": st.sampled_from([{"vision_encoder": ["q_proj"]}, BOTH]),
            "head": st.sampled_from(["text", "linear"]),
            "dropout": st.sampled_from([0.0, 0.3]),
        }
    ),
)
def test_whatever_the_shapes(sizes, batch_size, accumulation_steps, group_size, options):
    settings = LocalSettings(batch_size=batch_size, accumulation_steps=accumulation_steps)
    named = {f"c{i}": n for i, n in enumerate(sizes)}
    options = {"sizes": named, "ranks": {"c0": 2}, "dtype": torch.float64} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FedclipWarning)  # a linear head leaves the text tower idle
        one = rounds("batched", settings, group_size=group_size, static=True, **options)
        assert difference(one, rounds("sequential", settings, **options)) <= 1e-9


@pytest.mark.parametrize(
    "case",
    ["turns", "cores in a frame, sgd", "offsets", "shifted weights", "ranks that start anew"],
)
def test_strategies_find_room(case):
    """Tensors that take turns, cores behind frames, offsets, and frozen weights that change."""
    strategy, settings = CASES[case]
    kw = {"count": 2, "sizes": FEW, "strategy": strategy, "targets": BOTH, "dtype": torch.float64}
    one = rounds("batched", settings, static=True, **kw)
    assert difference(one, rounds("sequential", settings, **kw)) <= 1e-8


@h.settings(max_examples=50, deadline=None, derandomize=True)
@h.given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    batch_size=st.integers(1, 7),
    accumulation_steps=st.integers(1, 3),
)
def test_micro_steps_show_each_example_once_at_its_weight(sizes, batch_size, accumulation_steps):
    settings = LocalSettings(batch_size=batch_size, accumulation_steps=accumulation_steps)
    sizes = sorted(sizes, reverse=True)
    ends = np.cumsum(sizes)
    owned = [np.arange(end - n, end) for n, end in zip(sizes, ends, strict=True)]
    plans = [list(plan_steps(own, settings, 0)) for own in owned]
    work = Work(None, plans, [0] * len(plans), [torch.zeros(1)] * len(plans[0]), GradientTerms())
    shapes, seen = set(), np.zeros(sum(sizes))
    for micro in micro_steps(work, halves(len(sizes)), halves(min(batch_size, sizes[0]), by=4)):
        shapes.add((micro.size, micro.rows))
        assert len(micro.batches) <= micro.size
        real = micro.weights > 0
        np.add.at(seen, micro.indices[real], 1)
        assert real.sum() == sum(map(len, micro.batches))
        sums = micro.weights.reshape(micro.size, micro.rows).sum(axis=1)
        assert (sums <= 1 + 1e-12).all()
        if accumulation_steps == 1:
            assert sums[: len(micro.batches)] == pytest.approx(1)
    assert (seen == 1).all()
    assert len(shapes) <= len(halves(len(sizes))) * len(halves(batch_size, by=4))


class Asked(TorchDispatchMode):
    """Notes operations for which a GPU's host must wait, or which bring numbers from it."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh", "equal", "is_nonzero", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.FORBIDDEN:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {"targets": BOTH, "dropout": 0.2},
        {"head": "linear", "ranks": {"a": 1}},
        {"checkpointing": True},
    ],
    ids=str,
)
def test_a_step_never_asks_the_host(options, monkeypatch):
    asked = Asked()
    step = Room.step
    calls = []

    def watched(self, *shape):
        self._host_keys = None  # as on a GPU
        if shape not in calls:  # the first pass fills caches
            calls.append(shape)
            return step(self, *shape)
        with asked:
            return step(self, *shape)

    monkeypatch.setattr(Room, "step", watched)
    settings = LocalSettings(batch_size=8, proximal_mu=0.1, local_epochs=2)
    rounds("batched", settings, static=True, **options)
    assert asked.found == []
    with asked:
        torch.ones(2).max().item()
    assert asked.found  # it would notice


def test_one_room_serves_all_rounds():
    model = build(targets=BOTH)
    engine = create("batched", model, LocalSettings(batch_size=8), static=True)
    state = {name: p.detach().clone() for name, p in model.trainable().items()}
    places = []
    for server_round in (1, 2, 3):
        list(engine.train(TrainRequest(server_round, ("b", "d", "a"), state)))
        (room,) = engine._static._rooms.values()
        tensors = [v for v in vars(room).values() if isinstance(v, torch.Tensor)]
        tensors += [room.group.parameters.values, room.group.parameters.grads]
        places.append([tensor.data_ptr() for tensor in tensors])
    assert places[0] == places[1] == places[2]
    assert len(places[0]) >= 10


def test_masks_of_the_counter_are_splitmix64():
    def mixed(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    keys, shape, p = [5, 2**62 + 9], torch.Size((3, 7)), 0.3
    found = counted(shape, p, torch.tensor(keys), "layer").view(2, 21).tolist()
    for key, row in zip(keys, found, strict=True):
        start = mixed((key + seed_for(0, "lora_dropout", "layer")) % 2**64)
        for number, kept in enumerate(row):
            word = mixed((start + (number // 4 + 1) * 0x9E3779B97F4A7C15) % 2**64)
            level = word >> 16 * (number % 4) & 0xFFFF
            signed = level - 2**16 if level >= 2**15 else level
            assert kept == (signed >= round(p * 2**16) - 2**15)
    longer = counted(torch.Size((5, 7)), p, torch.tensor(keys), "layer").view(2, 5, 7)
    assert longer[:, :3].flatten(1).tolist() == found
    many = counted(torch.Size((1000, 100)), p, torch.arange(3), "layer").double()
    assert many.mean().item() * keep_scale(p) == pytest.approx(1, abs=0.01)


def test_masks_of_many_keys_are_those_of_each(monkeypatch):
    """Keys on a device give the stack what an engine that goes client by client draws there."""

    def kept(shape, p, key, layer, device):
        return counted(shape, p, torch.tensor([key]), layer)

    monkeypatch.setattr(stacked_clients, "kept", kept)
    model = build(targets=BOTH, dropout=0.3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(3, *p.shape, generator=generator, dtype=p.dtype)
        for name, p in model.trainable().items()
    }
    images = torch.from_numpy(data({"a": 12})[0])
    stacked = StackedClients(model)
    with torch.no_grad():
        one = stacked.logits(state, images, [4, 4, 4], [7, 8, 9])
        other = stacked.logits(state, images, [4, 4, 4], torch.tensor([7, 8, 9]))
        plain = stacked.logits(state, images, [4, 4, 4], [])
    assert torch.equal(one, other)
    assert not torch.allclose(one, plain)


def test_the_second_call_is_captured_and_a_failure_is_told_once(monkeypatch):
    calls, captured = [], []

    class Graph:
        def replay(self):
            calls.append("replay")

    class Capture:
        def __init__(self, graph, pool):
            captured.append(graph)

        def __enter__(self):
            if len(captured) == 2:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def __exit__(self, *error):
            return False

    monkeypatch.setattr(graphs_module.torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(graphs_module.torch.cuda, "graph", Capture)
    monkeypatch.setattr(graphs_module.torch.cuda, "graph_pool_handle", lambda: None)
    graphs = Graphs(torch.device("cuda"))

    def work():
        calls.append("work")

    for _ in range(3):
        graphs.run("a", work)
    assert calls == ["work", "work", "replay", "replay"]
    calls.clear()
    graphs.run("b", work)
    with pytest.warns(FedclipWarning, match="not permitted when stream is capturing\\)$"):
        graphs.run("b", work)
    graphs.run("b", work)
    graphs.run("c", work)
    graphs.run("c", work)
    assert calls == ["work"] * 5
    graphs.run("a", work)  # what was captured stays
    assert calls[-1] == "replay"
    assert len(graphs) == 1


def test_on_a_cpu_every_call_runs():
    graphs, calls = Graphs(CPU), []
    for _ in range(3):
        graphs.run("a", lambda: calls.append(1))
    assert (len(calls), len(graphs)) == (3, 0)
