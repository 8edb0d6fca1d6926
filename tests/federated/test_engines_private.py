"""DP-SGD in the engines: they agree, and without noise or clipping it is plain training."""

from itertools import zip_longest

import hypothesis as h
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from fedclip.device import product_dtype
from fedclip.federated.engines import private
from fedclip.federated.engines.batched import BatchedEngine
from fedclip.federated.engines.memory import ROW_BYTES, choose_group_size
from fedclip.federated.engines.sequential import SequentialEngine
from fedclip.federated.engines.threads import SideBySide
from fedclip.federated.local_steps import LocalSettings
from fedclip.federated.privacy.charging import with_digest
from fedclip.federated.privacy.dp_sgd import DpSgd, clip_rows
from fedclip.federated.privacy.secret import Draws
from fedclip.federated.updates import Updates
from fedclip.models.stacked.clients import StackedClients
from fedclip.models.stacked.prefix_cache import PixelInputs
from fedclip.records import TrainRequest
from tests.support.engines import BOTH, CPU, build, data

SIZES = {"a": 9, "b": 4}


def trained(kind, settings, *, private, sizes=SIZES, request=None, side=32, **options):
    """The clients' tensors after one request, in one cohort."""
    model = build(**options)
    pixels, labels, clients = data(sizes, side)
    common = (pixels, labels, clients, settings)
    if kind == "sequential":
        engine = SequentialEngine(model, *common, seed=1, device=CPU, private=private)
    else:
        stacked = StackedClients(model, products=product_dtype(settings.precision))
        images = PixelInputs(pixels, CPU)
        kw = {"images": images, "seed": 1, "device": CPU, "private": private}
        engine = BatchedEngine(stacked, *common, group_size=2, padded=True, static=True, **kw)
        if kind == "side by side":
            engine = BatchedEngine(stacked, *common, group_size=3, **kw)
            engine = SideBySide(engine, threads=2)
    state = {name: p.detach().cpu().clone() for name, p in model.trainable().items()}
    asked = with_digest(request(state) if request else TrainRequest(1, tuple(sizes), state))
    return Updates(asked, engine.train(asked)).stacked()


def difference(one, other):
    return max(
        ((one.tensors[n] - t).norm() / t.norm().clamp(min=1e-30)).item()
        for n, t in other.tensors.items()
    )


def dp_sgd(clip_norm=0.01, noise=0.5, batch_size=4):
    return DpSgd(clip_norm, dict.fromkeys("abc", noise), Draws(b"secret"), batch_size)


SETTINGS = LocalSettings(local_epochs=1, batch_size=4, learning_rate=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.2},
        {"dropout": 0.2, "targets": BOTH, "last": 1},
        {"dropout": 0.2, "head": "linear"},
    ],
    ids=str,
)
def test_batched_is_one_example_after_another_in_float64(options):
    one = trained("batched", SETTINGS, private=dp_sgd(), dtype=torch.float64, **options)
    other = trained("sequential", SETTINGS, private=dp_sgd(), dtype=torch.float64, **options)
    assert difference(one, other) <= 1e-9
    for mine, theirs in zip(one.reports, other.reports, strict=True):
        assert (mine.client_id, mine.steps) == (theirs.client_id, theirs.steps)
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-9)


def test_engines_agree_where_batches_of_some_or_all_are_empty():
    settings = LocalSettings(local_epochs=1, batch_size=1, learning_rate=1e-3)
    kw = {"private": dp_sgd(batch_size=1), "dtype": torch.float64, "dropout": 0.2}
    asked = []

    def request(state):
        asked.append(with_digest(TrainRequest(1, tuple(SIZES), state)))
        return asked[-1]

    one, other = (
        trained(kind, settings, request=request, **kw) for kind in ("batched", "sequential")
    )
    assert difference(one, other) <= 1e-9
    plans = [kw["private"].of(c, asked[0]).plan(np.arange(n), 1) for c, n in SIZES.items()]
    sizes = [[len(batch) for (batch,) in plan] for plan in plans]
    steps = list(zip_longest(*sizes, fillvalue=0))
    assert any(sum(step) == 0 for step in steps)
    assert any(0 in step and sum(step) for step in steps)
    assert max(map(max, steps)) > 1


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"augment": "affine"}], ids=str)
def test_engines_agree_with_other_settings(change):
    settings = LocalSettings(batch_size=4, learning_rate=1e-3, **change)
    # bf16 is too coarse for a small model, whose clipped gradients are few.
    options = {"private": dp_sgd(), "name": "random:tiny"}
    one = trained("batched", settings, **options)
    other = trained("sequential", settings, **options)
    assert difference(one, other) <= (0.05 if "precision" in change else 1e-4)


def test_passes_of_few_rows_change_nothing(monkeypatch):
    whole = trained("batched", SETTINGS, private=dp_sgd(), dtype=torch.float64)
    monkeypatch.setattr(private, "PASS_BYTES", 1)
    assert (
        difference(trained("batched", SETTINGS, private=dp_sgd(), dtype=torch.float64), whole)
        < 1e-9
    )


def test_a_group_is_as_large_as_its_examples_leave_room_for():
    model = build()
    stacked, state = StackedClients(model), model.get_parameters()
    numbers = sum(tensor.numel() for tensor in state.values())

    def size(batch_size, by_example, memory_gb=0.2):
        return choose_group_size(
            stacked,
            state,
            image_size=32,
            batch_size=batch_size,
            clients=10**6,
            memory_gb=memory_gb,
            device=CPU,
            by_example=by_example,
        )

    assert 1 <= size(8, True) < size(8, False)
    assert size(8, True) * 8 * ROW_BYTES * numbers < 0.2e9
    assert size(16, True) == pytest.approx(size(8, True) / 2, rel=0.1)


def test_sums_of_clipped_rows_are_those_of_the_reference():
    generator = torch.Generator().manual_seed(0)
    gradients = {"a": torch.randn(7, 2, 3, generator=generator), "b": torch.randn(7, 4)}
    gradients["b"][3, 1] = torch.inf
    gradients["a"][5] = torch.nan
    gradients["a"][6] *= 1e-3
    gradients["b"][6] *= 1e-3
    owner = torch.tensor([0, 0, 1, 1, 3, 3, 3])
    sums = {"a": torch.ones(4, 2, 3), "b": torch.ones(4, 4)}
    private._add_clipped(sums, gradients, owner, 0.5)
    rows = clip_rows(torch.cat([g.flatten(1) for g in gradients.values()], dim=1), 0.5)
    expected = torch.ones(4, 10).index_add(0, owner, rows)
    assert torch.allclose(torch.cat([s.flatten(1) for s in sums.values()], dim=1), expected)


def test_threads_change_nothing():
    one = trained("side by side", SETTINGS, private=dp_sgd())
    other = trained("batched", SETTINGS, private=dp_sgd())
    assert difference(one, other) <= 1e-5


def test_cores_between_frames_are_clipped_and_noised_as_they_travel():
    def request(state):
        generator = torch.Generator().manual_seed(3)
        frames = {
            n: torch.randn(t.shape, generator=generator, dtype=t.dtype)
            for n, t in state.items()
            if "lora_B" in n
        }
        cores = {n: torch.zeros(t.shape[1], t.shape[1], dtype=t.dtype) for n, t in frames.items()}
        return TrainRequest(
            1, tuple(SIZES), {**state, **cores}, trained=frozenset(frames), frames=frames
        )

    kw = {"private": dp_sgd(), "request": request, "dtype": torch.float64}
    one, other = (trained(kind, SETTINGS, **kw) for kind in ("batched", "sequential"))
    assert difference(one, other) <= 1e-9
    assert all(t.shape[1] == t.shape[2] for t in one.tensors.values())


@pytest.mark.parametrize("kind", ["batched", "sequential"])
def test_all_examples_without_clipping_or_noise_is_plain_training(kind):
    """With q = 1 every step takes all, in any order: the mean of all gradients, as without it."""
    sizes = {"a": 6}
    settings = LocalSettings(local_epochs=3, batch_size=6, optimizer="sgd", learning_rate=0.1)
    private = dp_sgd(clip_norm=1e6, noise=1e-18, batch_size=6)
    kw = {"sizes": sizes, "dtype": torch.float64}
    assert (
        difference(
            trained(kind, settings, private=private, **kw),
            trained(kind, settings, private=None, **kw),
        )
        <= 1e-9
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap's, on a few images
@pytest.mark.parametrize(
    ("options", "count", "side"),
    [
        ({"dtype": torch.float64}, 6, 32),
        ({"dtype": torch.float64, "targets": BOTH}, 6, 32),
        ({"dtype": torch.float64, "head": "linear"}, 6, 32),
        ({"name": "random:openai/clip-vit-base-patch32"}, 2, 224),
    ],
    ids=["vision", "both towers", "linear head", "ViT-B/32"],
)
def test_gradients_of_examples_are_vmaps(options, count, side):
    """Per-example gradients, clipped and summed, by torch.func on the sequential model."""
    sizes, clip = {"a": count}, 0.02
    settings = LocalSettings(
        batch_size=count, optimizer="sgd", learning_rate=1.0, weight_decay=0.0, max_grad_norm=None
    )
    private = dp_sgd(clip_norm=clip, noise=1e-12, batch_size=count)
    found = trained("batched", settings, private=private, sizes=sizes, side=side, **options)

    model = build(**options)
    model.eval()
    pixels, labels, _ = data(sizes, side)
    names = dict(model.trainable())
    by_parameter = {id(p): n for n, p in names.items()}
    full = {n: by_parameter[id(p)] for n, p in model.named_parameters() if id(p) in by_parameter}

    def loss(values, image, label):
        scores = torch.func.functional_call(model, values, (image[None],))
        return torch.nn.functional.cross_entropy(scores, label[None])

    values = {n: p.detach() for n, p in model.named_parameters() if n in full}
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
        values, torch.from_numpy(pixels), torch.from_numpy(labels)
    )
    flat = torch.cat([g.flatten(1) for g in grads.values()], dim=1)
    factors = (clip / flat.norm(dim=1)).clamp(max=1)
    assert (factors < 1).any()
    means = {n: torch.tensordot(factors, g, dims=1) / count for n, g in grads.items()}
    moved = {n: names[full[n]].detach() - found.tensors[full[n]][0] for n in grads}
    whole, difference = (
        torch.cat([t.flatten() for t in own])
        for own in (means.values(), [moved[n] - mean for n, mean in means.items()])
    )
    assert difference.norm() <= 1e-5 * whole.norm()


@h.settings(max_examples=1000, deadline=None)
@h.given(st.integers(0, 10**6), st.integers(1, 6), st.floats(1e-6, 1e6))
def test_one_row_more_changes_the_clipped_sums_by_the_norm_at_most(seed, rows, scale):
    generator = torch.Generator().manual_seed(seed)
    gradients = {
        "a": scale * torch.randn(rows, 3, 2, generator=generator),
        "b": scale * torch.randn(rows, 4, generator=generator),
    }
    owner = torch.randint(0, 2, (rows,), generator=generator)
    sums = []
    for count in (rows, rows - 1):
        of_clients = {name: torch.zeros(2, *g.shape[1:]) for name, g in gradients.items()}
        part = {name: g[:count] for name, g in gradients.items()}
        private._add_clipped(of_clients, part, owner[:count], 0.3)
        sums.append(torch.cat([t.flatten() for t in of_clients.values()]).double())
    assert (sums[0] - sums[1]).norm() <= 0.3 * (1 + 1e-5)


def test_one_example_more_changes_the_sum_by_the_norm_at_most():
    """With SGD at rate 1 a step moves by the gradient: sums with and without the last example."""
    clip, steps = 0.01, []
    settings = LocalSettings(
        batch_size=4, optimizer="sgd", learning_rate=1.0, weight_decay=0.0, max_grad_norm=None
    )
    for count in (4, 5):
        private = dp_sgd(clip_norm=clip, noise=1e-12)
        model = build(dropout=0.3, dtype=torch.float64)
        pixels, labels, _ = data({"a": 5})
        everyone = {"a": np.arange(count)}
        stacked = StackedClients(model)
        kw = {"images": PixelInputs(pixels, CPU), "seed": 1, "device": CPU, "private": private}
        engine = BatchedEngine(stacked, pixels, labels, everyone, settings, group_size=1, **kw)
        state = {name: p.detach().clone() for name, p in model.trainable().items()}
        request = with_digest(TrainRequest(1, ("a",), state))
        plan = private.of("a", request).plan
        whole = [[np.arange(count)]]  # everybody is drawn, with and without the fifth
        type(private.of("a", request)).plan = lambda self, indices, epochs, whole=whole: whole
        try:
            ended = Updates(request, engine.train(request)).stacked().tensors
        finally:
            type(private.of("a", request)).plan = plan.__func__
        steps.append({n: (state[n] - t[0]) * 4 for n, t in ended.items()})
    moved = torch.cat([(steps[0][n] - steps[1][n]).flatten() for n in steps[0]])
    assert 1e-6 < moved.norm() <= clip * (1 + 1e-9)
