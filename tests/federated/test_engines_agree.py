"""The engines do the same work: factors, losses and steps agree, whatever the grouping."""

import gc
import warnings
from dataclasses import replace

import hypothesis as h
import pytest
import torch
from hypothesis import strategies as st

from fedclip.errors import FedclipWarning, TrainingFailed
from fedclip.federated.engines.batched import BatchedEngine
from fedclip.federated.engines.memory import activation_bytes, choose_group_size
from fedclip.federated.local_steps import LocalSettings
from fedclip.models.stacked.clients import StackedClients
from fedclip.records import TrainRequest
from tests.support.engines import (
    BOTH,
    CPU,
    SIZES,
    VISION,
    base_with_quick_gelu,
    build,
    create,
    data,
    difference,
    rounds,
)
from tests.support.models import shaken


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"targets": BOTH},
        {"head": "linear"},
        {"head": "linear", "targets": {}},
        {"dropout": 0.2},
        {"dropout": 0.2, "targets": BOTH},
    ],
    ids=str,
)
def test_batched_equals_sequential_in_float64_after_three_rounds(options):
    settings = LocalSettings(local_epochs=2, batch_size=8, learning_rate=1e-3, schedule="cosine")
    one = rounds("batched", settings, count=3, dtype=torch.float64, **options)
    other = rounds("sequential", settings, count=3, dtype=torch.float64, **options)
    assert difference(one, other) <= 1e-9
    for mine, theirs in zip(one.reports, other.reports, strict=True):
        assert (mine.client_id, mine.num_examples, mine.steps) == (
            theirs.client_id,
            theirs.num_examples,
            theirs.steps,
        )
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        {"accumulation_steps": 3},
        {"proximal_mu": 0.3},
        {"max_grad_norm": 0.01},
        {"optimizer": "sgd", "learning_rate": 0.1},
        {"augment": "affine", "accumulation_steps": 2},
        {"accumulation_steps": 2, "proximal_mu": 0.1, "schedule": "linear"},
    ],
    ids=str,
)
def test_every_setting_agrees(change):
    settings = LocalSettings(**{"batch_size": 4, "local_epochs": 2} | change)
    options = {"dropout": 0.1, "dtype": torch.float64}
    one = rounds("batched", settings, **options)
    assert difference(one, rounds("sequential", settings, **options)) <= 1e-9


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_decays_agrees(optimizer):
    """A linear head has a bias, which does not."""
    settings = LocalSettings(
        batch_size=8, optimizer=optimizer, weight_decay=0.9, learning_rate=0.01
    )
    options = {"targets": {}, "head": "linear", "dtype": torch.float64}
    one = rounds("batched", settings, **options)
    assert difference(one, rounds("sequential", settings, **options)) <= 1e-9


LAYERWISE = {
    "exclude_modules": ["vision_encoder.layers.0-1"],
    "rank_pattern": {"vision_encoder.layers.3.fc1": 5, "text_encoder.k_proj": 1},
    "alpha_pattern": {"visual_projection": 3},
    "dropout_pattern": {"q_proj": 0.0, "visual_projection": 0.3},
}
RSLORA = LAYERWISE | {"use_rslora": True}
PROJECTIONS = {
    "vision_encoder": ["q_proj", "fc1", "visual_projection"],
    "text_encoder": ["k_proj", "text_projection"],
}
PROBE = {"targets": {}, "head": "linear"}
ONE_PROJECTION = {"vision_encoder": ["visual_projection"]}


@pytest.mark.parametrize(
    ("options", "kind", "optimizer"),
    [
        ({"targets": PROJECTIONS, "lora": LAYERWISE}, {}, "adamw"),
        ({"targets": PROJECTIONS, "lora": RSLORA}, {"cached": True}, "sgd"),
        ({"targets": ONE_PROJECTION, "head": "linear"}, {"padded": True}, "adamw"),
        ({"targets": ONE_PROJECTION}, {"cached": True}, "sgd"),
        ({"targets": {"text_encoder": ["text_projection"]}}, {"cached": True}, "adamw"),
        ({"targets": {}, "head": "linear", "ranks": None}, {"cached": True}, "sgd"),
    ],
    ids=["layerwise", "rslora", "head", "image", "text", "probe"],
)
def test_layerwise_configurations_agree(options, kind, optimizer):
    rates = {"lora_B": 4.0, "vision_encoder": 0.5, "head": 0.0, "text_encoder": 2.0}
    if not options["targets"]:
        rates = {"head.bias": 2.0}
    settings = LocalSettings(
        batch_size=8, local_epochs=2, optimizer=optimizer, learning_rate=1e-2, rate_pattern=rates
    )
    options = {"dropout": 0.2, "dtype": torch.float64, "ranks": {"a": 2, "d": 1}} | options
    one = rounds("batched", settings, **kind, **options)
    other = rounds("sequential", settings, **options)
    assert difference(one, other) <= 1e-9


def test_rates_by_pattern_make_a_difference():
    settings = LocalSettings(batch_size=8, optimizer="sgd", learning_rate=1e-2, max_grad_norm=None)
    start = build().get_parameters()
    plain, doubled = (
        rounds("batched", replace(settings, rate_pattern=rates), sizes={"a": 8})
        for rates in ({}, {"layers.3.*lora_B": 2.0, "q_proj": 0.0})
    )
    for name, value in start.items():
        factor = 2 if "layers.3." in name and "lora_B" in name else "q_proj" not in name
        moved, twin = (run.state.shared[name] - value for run in (doubled, plain))
        assert (moved - factor * twin).norm() <= 1e-4 * (twin.norm() + 1e-3)


def test_ranks_may_change_under_a_stacked_model():
    model = build(targets=PROJECTIONS)
    model.set_parameters(shaken(model))
    stacked = StackedClients(model)
    images = torch.from_numpy(data(SIZES)[0][:9])
    for change in ({"fc1": 1, "text_encoder": 2}, 6, {"visual_projection": 2}):
        model.set_rank(change)
        state = {name: p.detach()[None] for name, p in model.trainable().items()}
        with torch.no_grad():
            expected = model(images)
            together = stacked.logits(state, images, [9], [])
            merged = stacked.merged(model.trainable())(images)
        for found in (together, merged):
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_thirty_steps_of_adamw_agree_in_float32():
    settings = LocalSettings(local_epochs=6, batch_size=8, learning_rate=1e-3)
    one = rounds("batched", settings)
    assert difference(one, rounds("sequential", settings)) <= 1e-5
    assert max(report.steps for report in one.reports) == 30


@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_the_grouping_does_not_matter(group_size):
    settings = LocalSettings(batch_size=8)
    options = {"dropout": 0.1, "dtype": torch.float64}
    one = rounds("batched", settings, group_size=group_size, **options)
    assert difference(one, rounds("batched", settings, **options)) <= 1e-9


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_padding_changes_nothing(accumulation_steps):
    settings = LocalSettings(batch_size=8, local_epochs=2, accumulation_steps=accumulation_steps)
    options = {"dropout": 0.1, "targets": BOTH, "dtype": torch.float64}
    one = rounds("batched", settings, padded=True, **options)
    assert difference(one, rounds("sequential", settings, **options)) <= 1e-9


@pytest.mark.parametrize("targets", [VISION, BOTH, {"text_encoder": ["q_proj"]}], ids=str)
@pytest.mark.parametrize("last", [1, 2, None])
def test_a_kept_prefix_changes_nothing(targets, last):
    settings = LocalSettings(batch_size=8, local_epochs=2)
    options = {"targets": targets, "last": last, "dtype": torch.float64}
    one = rounds("batched", settings, count=2, cached=True, **options)
    assert difference(one, rounds("sequential", settings, count=2, **options)) <= 1e-9


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_mixed_ranks_agree(optimizer):
    settings = LocalSettings(batch_size=8, local_epochs=2, optimizer=optimizer, learning_rate=1e-2)
    options = {"dropout": 0.1, "dtype": torch.float64, "targets": BOTH, "ranks": {"a": 1, "d": 2}}
    one = rounds("batched", settings, **options)
    assert difference(one, rounds("sequential", settings, **options)) <= 1e-9


def test_a_client_of_lower_rank_leaves_the_other_rows_at_zero():
    settings = LocalSettings(batch_size=8, learning_rate=1e-2)
    model = build()
    state = {name: p.detach().clone() for name, p in model.trainable().items()}
    engine = create("batched", model, settings)
    (cohort,) = engine.train(TrainRequest(1, ("b", "a"), state, ranks={"a": 2}))
    for name, stacked in cohort.tensors.items():
        whole, cut = stacked if ".lora_A." in name else stacked.transpose(1, 2)
        assert whole[2].abs().max() > 0
        assert cut[:2].abs().max() > 0
        assert not cut[2].any()


def test_thirty_steps_agree_for_clip_s_own_activation(tmp_path):
    """`quick_gelu` has a backward pass of its own here."""
    settings = LocalSettings(local_epochs=6, batch_size=8, learning_rate=1e-3)
    folder = base_with_quick_gelu(tmp_path)
    for targets in (VISION, {"vision_encoder": ["q_proj", "out_proj"]}):
        options = {"name": f"random:{folder}", "targets": targets}
        one = rounds("batched", settings, **options)
        assert difference(one, rounds("sequential", settings, **options)) <= 1e-5


def test_checkpointing_changes_nothing():
    settings = LocalSettings(batch_size=8)
    options = {"dropout": 0.1, "targets": BOTH}
    one = rounds("batched", settings, checkpointing=True, **options)
    assert difference(one, rounds("batched", settings, **options)) <= 1e-6


@h.settings(max_examples=12, deadline=None, derandomize=True)
@h.given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    batch_size=st.integers(1, 5),
    accumulation_steps=st.integers(1, 3),
    local_epochs=st.integers(1, 2),
    group_size=st.integers(1, 4),
    rank=st.integers(1, 3),
    options=st.fixed_dictionaries(
        {
            "targets": st.sampled_from([VISION, BOTH]),
            "head": st.sampled_from(["text", "linear"]),
            "dropout": st.sampled_from([0.0, 0.3]),
            "last": st.sampled_from([None, 1]),
        }
    ),
    variant=st.fixed_dictionaries({"padded": st.booleans(), "cached": st.booleans()}),
)
def test_whatever_the_shapes(
    sizes, batch_size, accumulation_steps, local_epochs, group_size, rank, options, variant
):
    settings = LocalSettings(
        batch_size=batch_size, accumulation_steps=accumulation_steps, local_epochs=local_epochs
    )
    named = {f"c{i}": n for i, n in enumerate(sizes)}
    options = {"sizes": named, "ranks": {"c0": rank}, "dtype": torch.float64} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FedclipWarning)  # a linear head leaves the text tower idle
        one = rounds("batched", settings, group_size=group_size, **variant, **options)
        assert difference(one, rounds("sequential", settings, **options)) <= 1e-9


def test_one_step_is_vmap_of_grad_over_peft():
    """The oracle: torch.func over the PEFT model as it stands."""
    model = build(targets=BOTH, dtype=torch.float64)
    pixels, labels, _ = data({"a": 6, "b": 6, "c": 6})
    rng = torch.Generator().manual_seed(0)
    start = {
        name: p.detach() + 0.05 * torch.randn(3, *p.shape, generator=rng, dtype=p.dtype)
        for name, p in model.trainable().items()
    }
    live = {id(p): name for name, p in model.trainable().items()}
    names = {name: live[id(p)] for name, p in model.named_parameters() if id(p) in live}

    def loss(state, images, targets):
        own = {path: state[name] for path, name in names.items()}
        scores = torch.func.functional_call(model, own, (images,))
        return torch.nn.functional.cross_entropy(scores, targets)

    images = torch.from_numpy(pixels).view(3, 6, *pixels.shape[1:]).double() / 255
    targets = torch.from_numpy(labels).view(3, 6)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch.func.vmap(torch.func.grad(loss))(start, images, targets)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    scores = StackedClients(model).logits(leaves, images.flatten(0, 1), [6, 6, 6], [])
    total = torch.nn.functional.cross_entropy(scores, targets.flatten(), reduction="sum") / 6
    found = torch.autograd.grad(total, list(leaves.values()))
    for (name, _), gradient in zip(leaves.items(), found, strict=True):
        assert (gradient - expected[name]).norm() <= 1e-10 * expected[name].norm(), name


def test_evaluation_on_merged_weights_is_the_model_s_own():
    projections = (
        {"targets": PROJECTIONS, "lora": LAYERWISE},
        {"targets": ONE_PROJECTION},
    )
    for options in ({"targets": BOTH}, {"head": "linear"}, PROBE, {"last": 1}, *projections):
        model = build(**options)
        model.set_parameters(shaken(model))
        pixels, _, _ = data(SIZES)
        images = torch.from_numpy(pixels[:9])
        stacked = StackedClients(model)
        merged = stacked.merged(model.trainable())
        with torch.no_grad():
            expected = model(images)
            for inputs in (images, stacked.frozen(images)):
                assert (merged(inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_group_that_does_not_fit_is_halved(monkeypatch):
    settings = LocalSettings(batch_size=8)
    sizes_tried = []
    train_group = BatchedEngine._train_group

    def small_memory(self, ids, request):
        sizes_tried.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError
        return train_group(self, ids, request)

    whole = rounds("batched", settings, dtype=torch.float64)
    monkeypatch.setattr(BatchedEngine, "_train_group", small_memory)
    with pytest.warns(FedclipWarning, match=r"engine\.group_size is [23]"):
        assert difference(rounds("batched", settings, dtype=torch.float64), whole) <= 1e-9
    assert sizes_tried == [5, 3, 2, 2, 1]


def test_one_client_too_large_is_an_error_with_a_remedy(monkeypatch):
    def no_memory(self, ids, request):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(BatchedEngine, "_train_group", no_memory)
    with (
        pytest.warns(FedclipWarning, match="group_size"),
        pytest.raises(TrainingFailed, match=r"data\.batch_size"),
    ):
        rounds("batched", LocalSettings())


def test_activations_are_what_one_more_client_adds():
    model = build(dropout=0.1, targets=BOTH)
    stacked, state = StackedClients(model), model.get_parameters()

    def kept(clients, images):
        found = {}
        own = {n: t.repeat(clients, *[1] * t.dim()).requires_grad_() for n, t in state.items()}
        pixels = torch.zeros(clients * images, 3, 32, 32, dtype=torch.uint8)

        def note(tensor):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            result = stacked.logits(own, pixels, [images] * clients, range(clients))
        assert result.shape[0] == clients * images
        return sum(found.values())

    for images in (1, 7):
        found = activation_bytes(stacked, state, image_size=32, batch_size=images, device=CPU)
        assert found == pytest.approx(kept(3, images) - kept(2, images), rel=1e-4)


def test_what_was_measured_is_freed():
    """A hook that gives back the very tensor closes a circle that no collector sees."""
    model = build(dropout=0.1, targets=BOTH)
    stacked, state = StackedClients(model), model.get_parameters()

    def tensors():
        activation_bytes(stacked, state, image_size=32, batch_size=2, device=CPU)
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    tensors()  # keeps what the frozen layers make of the prompts
    assert tensors() == tensors()


def test_the_group_follows_the_memory():
    model = build(dropout=0.1, targets=BOTH)
    state = model.get_parameters()

    def size(memory_gb, batch_size=8):
        return choose_group_size(
            StackedClients(model),
            state,
            image_size=32,
            batch_size=batch_size,
            clients=50,
            memory_gb=memory_gb,
            device=CPU,
        )

    assert size(1e-9) == 1
    assert size(1000) == 50
    few, many = size(0.02), size(0.04)
    assert 1 < few < many < 50
    assert abs(many - 2 * few) <= 1
    assert size(0.04, batch_size=32) < many
