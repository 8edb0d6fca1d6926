"""Predictions, spreads and the keys of figures, by hand."""

import numpy as np
import pytest
import torch

from fedclip.evaluation.metrics import METRICS, accuracy, loss
from fedclip.evaluation.per_client import figures, spread, together, told_by_clients
from fedclip.evaluation.predictions import How, Predictions, classify
from fedclip.models.stacked.prefix_cache import PixelInputs
from tests.support.evaluation import made
from tests.support.toys import CPU, Toy, toy_data


def test_predictions_equal_a_direct_computation_and_count_each_example_once():
    pixels, labels = toy_data(30)
    model = Toy()
    with torch.no_grad():
        model.linear.weight.copy_(torch.eye(2, 3))
    seen = []
    model.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    indices = np.array([3, 4, 5, 5, 3, 20, 29])
    found = classify(model, PixelInputs(pixels, CPU), labels, indices, How(CPU, batch_size=2))
    assert sum(seen) == 5
    logits = model(torch.from_numpy(pixels[indices])).detach()
    targets = torch.from_numpy(labels[indices])
    hits = (logits.argmax(-1) == targets).double().mean().item()
    assert accuracy(found) == pytest.approx(hits)
    nats = torch.nn.functional.cross_entropy(logits.float(), targets).item()
    assert loss(found) == pytest.approx(nats, rel=1e-6)
    assert found.logits == pytest.approx(logits.numpy())
    assert found.confidence == pytest.approx(logits.softmax(-1).amax(-1).numpy(), rel=1e-6)
    assert not model.training


def test_no_examples_give_no_figures():
    pixels, labels = toy_data(3)
    empty = np.array([], dtype=np.int64)
    found = classify(Toy(), PixelInputs(pixels, CPU), labels, empty, How(CPU))
    assert len(found) == 0
    assert all(metric(found) is None for metric in METRICS.values())
    some = made([0, 1, 1], [0, 0, 1])
    both = Predictions.concatenate([found, some, found])
    assert (len(both), both.logits.shape) == (3, (3, 2))
    assert [len(part) for part in both.split([0, 1, 2])] == [0, 1, 2]


def test_the_spread_leaves_out_clients_without_test_examples():
    assert spread({"a": 0.5, "b": None, "c": 1.0}) == {"mean": 0.75, "min": 0.5, "max": 1.0}
    assert spread({"a": None}) is None


TEST = made([0, 0, 0, 1], [0, 0, 0, 0], losses=[0.0, 0.0, 1.0, 3.0])


def test_every_metric_stands_beside_accuracy_and_in_the_same_way():
    chosen = ("accuracy", "loss", "majority_class_rate")
    found = figures(
        TEST,
        made([1], [1]),
        {"a": TEST, "b": made([0, 1], [0, 1]), "c": made([], [])},
        {name: METRICS[name] for name in chosen},
    )
    assert found == {
        "accuracy": 0.75,
        "test_loss": 1.0,
        "test_examples": 4,
        "validation_accuracy": 1.0,
        "validation_loss": 0.0,
        "client_accuracy": {"mean": 0.875, "min": 0.75, "max": 1.0},
        "accuracy_by_client": {"a": 0.75, "b": 1.0, "c": None},
        "majority_class_rate": 0.75,
        "validation_majority_class_rate": 1.0,
        "client_majority_class_rate": {"mean": 0.625, "min": 0.5, "max": 0.75},
        "majority_class_rate_by_client": {"a": 0.75, "b": 0.5, "c": None},
    }


def test_tasks_are_joined_by_their_mean():
    metrics = {name: METRICS[name] for name in ("accuracy", "loss", "balanced_accuracy")}
    one = figures(TEST, TEST, {"a": TEST}, metrics)
    two = figures(made([0, 1], [0, 1]), made([], []), {"b": made([0], [1])}, metrics)
    found = together({"one": one, "two": two}, ["balanced_accuracy"])
    assert found["balanced_accuracy"] == 0.75  # a half (one class of two) and one
    assert found["balanced_accuracy_by_task"] == {"one": 0.5, "two": 1.0}
    assert found["validation_balanced_accuracy"] is None
    assert found["client_balanced_accuracy"] == {"mean": 0.25, "min": 0.0, "max": 0.5}
    assert (found["accuracy"], found["test_loss"], found["test_examples"]) == (0.875, 0.5, 6)


def test_counts_of_sites_leave_other_metrics_unknown():
    told = told_by_clients({"a": (4, 3)}, ["a"], personal=True, metrics=["macro_f1"])
    assert (told["accuracy"], told["macro_f1"], told["validation_macro_f1"]) == (0.75, None, None)
    assert "macro_f1" not in told_by_clients({}, ["a"], personal=False, metrics=["macro_f1"])
