"""The engines do the same work: factors, losses and steps agree, whatever the grouping."""

import numpy as np
import pytest
import torch

from fedclip.engines.batched import BatchedEngine
from fedclip.engines.memory import choose_group_size
from fedclip.engines.sequential import SequentialEngine
from fedclip.errors import TrainingFailed
from fedclip.federated.client import LocalSettings
from fedclip.federated.server import run_rounds
from fedclip.federated.strategies import FedAvg
from fedclip.models.clip import create_clip_model
from fedclip.models.stacked import StackedClients

CPU = torch.device("cpu")
VISION = {"vision_encoder": ["q_proj", "v_proj", "fc1"]}
BOTH = VISION | {"text_encoder": ["k_proj", "out_proj"]}
SIZES = {"a": 23, "b": 40, "c": 9, "d": 40, "e": 1}


def build(head="text", targets=VISION, dropout=0.0, dtype=torch.float32):
    config = {
        "model_name": "random:tiny",
        "head": head,
        "lora": {"r": 3, "lora_alpha": 6, "lora_dropout": dropout, "target_modules": targets},
    }
    names = ["zero", "one", "two", "three"]
    return create_clip_model(config, class_names=names, templates=["{}", "the digit {}"]).to(dtype)


def rounds(kind, settings, *, count=1, group_size=5, model=None, sizes=SIZES, **options):
    model = model or build(**options)
    rng = np.random.default_rng(0)
    total = sum(sizes.values())
    pixels = rng.integers(0, 255, (total, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(0, 4, total)
    ends = np.cumsum(list(sizes.values()))
    clients = {c: np.arange(e - n, e) for (c, n), e in zip(sizes.items(), ends, strict=True)}
    common = (pixels, labels, clients, settings)
    if kind == "sequential":
        engine = SequentialEngine(model, *common, seed=1, device=CPU)
    else:
        stacked = StackedClients(model)
        engine = BatchedEngine(stacked, *common, group_size=group_size, seed=1, device=CPU)
    state = {name: p.detach().clone() for name, p in model.trainable().items()}
    loop = run_rounds(
        state, engine, FedAvg(), clients=sizes, rounds=count, clients_per_round=len(sizes), seed=1
    )
    return list(loop)[-1]


def difference(one, other):
    """Largest relative Frobenius difference of any tensor that training moved."""
    return max(
        ((one.state[n] - other.state[n]).norm() / other.state[n].norm().clamp(min=1e-30)).item()
        for n in one.state
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"targets": BOTH},
        {"head": "linear"},
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


def test_the_wrapped_model_is_as_before():
    model = build()
    before = [type(m).__name__ for m in model.modules()]
    rounds("batched", LocalSettings(), model=model)
    assert [type(m).__name__ for m in model.modules()] == before


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
    assert difference(rounds("batched", settings, dtype=torch.float64), whole) <= 1e-9
    assert sizes_tried == [5, 3, 2, 2, 1]


def test_one_client_too_large_is_an_error_with_a_remedy(monkeypatch):
    def no_memory(self, ids, request):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(BatchedEngine, "_train_group", no_memory)
    with pytest.raises(TrainingFailed, match=r"data\.batch_size"):
        rounds("batched", LocalSettings())


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
    few, many = size(0.1), size(0.2)
    assert 1 < few < many < 50
    assert abs(many - 2 * few) <= 1
    assert size(0.2, batch_size=32) < many
