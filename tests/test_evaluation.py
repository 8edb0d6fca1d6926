"""Scores and spreads, by hand."""

import numpy as np
import pytest
import torch

from fedclip.evaluation.accuracy import score, spread
from fedclip.models.stacked.prefix_cache import PixelInputs
from tests.toys import CPU, Toy, toy_data


def test_scores_equal_a_direct_computation_and_count_each_example_once():
    pixels, labels = toy_data(30)
    model = Toy()
    with torch.no_grad():
        model.linear.weight.copy_(torch.eye(2, 3))
    seen = []
    model.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    indices = np.array([3, 4, 5, 5, 3, 20, 29])
    scores = score(model, PixelInputs(pixels, CPU), labels, indices, device=CPU, batch_size=2)
    assert sum(seen) == 5
    logits = model(torch.from_numpy(pixels[indices]))
    targets = torch.from_numpy(labels[indices])
    hits = (logits.argmax(-1) == targets).double().mean().item()
    assert scores.accuracy(indices) == pytest.approx(hits)
    loss = torch.nn.functional.cross_entropy(logits.float(), targets).item()
    assert scores.loss(indices) == pytest.approx(loss, rel=1e-6)
    assert not model.training


def test_no_examples_give_no_accuracy():
    pixels, labels = toy_data(3)
    scores = score(
        Toy(), PixelInputs(pixels, CPU), labels, np.array([], dtype=np.int64), device=CPU
    )
    assert scores.accuracy(np.array([], dtype=np.int64)) is None


def test_the_spread_leaves_out_clients_without_test_examples():
    assert spread({"a": 0.5, "b": None, "c": 1.0}) == {"mean": 0.75, "min": 0.5, "max": 1.0}
    assert spread({"a": None}) is None
