"""On a GPU the engines do the same work as on a CPU; skipped where there is none."""

import warnings
from dataclasses import replace

import pytest
import torch

import fedclip
from fedclip.errors import FedclipWarning
from fedclip.experiment.run import resume
from fedclip.federated.engines.batched import BatchedEngine
from fedclip.federated.local_steps import LocalSettings
from fedclip.models.dropout import counted
from fedclip.records import TrainRequest
from tests.support.engines import BOTH, build, create, difference, rounds
from tests.support.runs import StopAfter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
SETTINGS = LocalSettings(local_epochs=2, batch_size=8, schedule="cosine", proximal_mu=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"targets": BOTH, "dropout": 0.2},
        {"head": "linear", "ranks": {"a": 2, "d": 1}},
        {"last": 1, "cached": True},
        {"checkpointing": True},
    ],
    ids=str,
)
def test_the_engines_agree_in_float64(options):
    model_only = {k: v for k, v in options.items() if k != "cached"}
    common = {"count": 2, "dtype": torch.float64}
    expected = rounds("sequential", SETTINGS, device=GPU, **common, **model_only)
    for padded in (True, False):
        found = rounds("batched", SETTINGS, device=GPU, padded=padded, **common, **options)
        assert difference(found, expected) <= 1e-9
    found = rounds("batched", SETTINGS, device=GPU, static=True, **common, **options)
    assert difference(found, expected) <= 1e-9
    if not options.get("dropout"):  # a GPU draws other masks
        on_cpu = rounds("sequential", SETTINGS, **common, **model_only)
        assert difference(expected, on_cpu) <= 1e-9


def test_steps_are_captured_and_replayed():
    """All rounds by the same graphs; nothing is said, which would be a failed capture."""
    model = build(targets=BOTH, dropout=0.2, dtype=torch.float64).to(GPU)
    engine = create("batched", model, SETTINGS, static=True, device=GPU)
    plain = create("batched", model, SETTINGS, padded=True, device=GPU)
    state = {name: p.detach().cpu() for name, p in model.trainable().items()}
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", FedclipWarning)
        for server_round in (1, 2, 3):
            request = TrainRequest(server_round, ("b", "d", "a", "c", "e"), state)
            (found,), (expected,) = engine.train(request), plain.train(request)
            for name, tensor in found.tensors.items():
                assert (tensor - expected.tensors[name]).norm() <= 1e-9 * tensor.norm()
            counts.append(sum(map(len, engine._static.graphs)))
    assert counts[0] > 0
    assert counts[1] == counts[2]


def test_masks_are_those_of_a_cpu():
    keys, shape = torch.tensor([3, 2**62 + 1]), torch.Size((5, 7, 9))
    on_cpu = counted(shape, 0.3, keys, "layer")
    assert torch.equal(counted(shape, 0.3, keys.to(GPU), "layer").cpu(), on_cpu)


def test_bf16_is_near_fp32():
    settings = LocalSettings(local_epochs=2, batch_size=8, learning_rate=1e-3, optimizer="sgd")
    short = replace(settings, precision="bf16")
    start = build(targets=BOTH).get_parameters()
    exact = rounds("batched", settings, padded=True, device=GPU, targets=BOTH)
    for kind in ("batched", "sequential"):
        found = rounds(kind, short, padded=True, device=GPU, targets=BOTH)
        for name, before in start.items():
            if "lora_B" in name:  # A has no gradient at first
                way, wanted = (run.state.shared[name] - before for run in (found, exact))
                assert (way - wanted).norm() <= 0.1 * wanted.norm(), name


def test_a_group_that_does_not_fit_is_halved(monkeypatch):
    """Memory that really runs out, by a limit of what this process may take of the GPU's."""
    sizes = {str(i): 64 for i in range(64)}
    settings = LocalSettings(batch_size=64)
    options = {"sizes": sizes, "group_size": 64, "padded": True, "device": GPU}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    whole = rounds("batched", settings, dtype=torch.float64, **options)
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    tried = []
    train_group = BatchedEngine._train_group

    def noted(self, ids, request):
        tried.append(len(ids))
        return train_group(self, ids, request)

    monkeypatch.setattr(BatchedEngine, "_train_group", noted)
    torch.cuda.set_per_process_memory_fraction(0.7 * peak / total)
    try:
        with pytest.warns(FedclipWarning, match=r"engine\.group_size is 32"):
            halved = rounds("batched", settings, dtype=torch.float64, **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tried == [64, 32, 32]
    assert difference(halved, whole) <= 1e-9


def test_a_run_ends_near_that_of_a_cpu_and_goes_on_after_a_stop(tmp_path):
    config = {
        "client": {"local_epochs": 2, "learning_rate": 5e-3},
        "data": {"name": "digits"},
        "federation": {"rounds": 3, "num_clients": 5},
        "seed": 3,
    }
    on_cpu = fedclip.run({**config, "device": "cpu"}, output=tmp_path / "cpu")
    whole = fedclip.run({**config, "device": "cuda"}, output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fedclip.run({**config, "device": "cuda"}, output=tmp_path / "cut", listener=StopAfter(2))
    resumed = resume(tmp_path / "cut")
    assert on_cpu.summary["accuracy"] > on_cpu.summary["zero_shot_accuracy"]
    for run in (whole, resumed):
        assert run.summary["accuracy"] == pytest.approx(on_cpu.summary["accuracy"], abs=0.02)
