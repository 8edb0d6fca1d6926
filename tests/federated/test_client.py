"""Local training against steps worked out by hand and against plain PyTorch loops."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedclip.errors import TrainingFailed
from fedclip.federated.client import local_train
from fedclip.federated.local_steps import LocalSettings, schedule_factor
from tests.support.toys import CPU, Toy, toy_data


def train(model, n=40, seed=1, progress=0.0, round_share=1.0, data_seed=0, **settings):
    pixels, labels = toy_data(n, data_seed)
    return local_train(
        model,
        pixels,
        labels,
        np.arange(n),
        LocalSettings(
            **{"optimizer": "sgd", "weight_decay": 0.0, "max_grad_norm": None} | settings
        ),
        seed=seed,
        device=CPU,
        progress=progress,
        round_share=round_share,
    )


def test_one_sgd_step_by_hand():
    model = Toy()
    pixels = np.zeros((1, 3, 2, 2), dtype=np.uint8)
    pixels[0, 0] = 255  # x = (1, 0, 0)
    result = local_train(
        model,
        pixels,
        np.array([1]),
        np.array([0]),
        LocalSettings(optimizer="sgd", learning_rate=0.5, weight_decay=0.0, max_grad_norm=None),
        seed=0,
        device=CPU,
    )
    # Softmax of zeros is (1/2, 1/2): gradient (1/2, -1/2) times x, step 0.5.
    expected = torch.tensor([[-0.25, 0, 0], [0.25, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(model.linear.weight.detach(), expected, rtol=0, atol=1e-15)
    assert result.loss == pytest.approx(math.log(2), abs=1e-12)
    assert result.steps == 1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_only_matrices_decay(optimizer):
    """Black images of both classes pull at nothing: what is left moves by its decay alone."""
    model = Toy()
    torch.nn.init.ones_(model.linear.weight)
    kw = {"optimizer": optimizer, "learning_rate": 0.1, "max_grad_norm": None}
    pixels, labels = np.zeros((2, 3, 2, 2), dtype=np.uint8), np.array([0, 1])
    for decay in (0.0, 0.5):
        settings = LocalSettings(weight_decay=decay, **kw)
        torch.nn.init.constant_(model.linear.bias, 1.0)
        local_train(model, pixels, labels, np.arange(2), settings, seed=0, device=CPU)
        left = torch.full((2, 3), 1 - 0.1 * decay, dtype=torch.float64)
        torch.testing.assert_close(model.linear.weight.detach(), left)
        torch.testing.assert_close(model.linear.bias.detach(), torch.ones(2, dtype=torch.float64))


def test_rates_by_pattern_by_hand():
    """The first pattern that fits counts, and what none fits keeps the rate."""
    plain = Toy()
    train(plain, n=8, batch_size=8, learning_rate=0.5)
    for pattern, weight, bias in (
        ({"bias": 0.0}, 1.0, 0.0),
        ({"linear.weight": 3.0, "linear": 0.25}, 3.0, 0.25),
        ({"linear": 0.25, "linear.weight": 3.0}, 0.25, 0.25),
        ({"conv": 2.0}, 1.0, 1.0),
    ):
        model = Toy()
        train(model, n=8, batch_size=8, learning_rate=0.5, rate_pattern=pattern)
        torch.testing.assert_close(model.linear.weight, weight * plain.linear.weight)
        torch.testing.assert_close(model.linear.bias, bias * plain.linear.bias)
    assert plain.linear.bias.abs().min() > 1e-3


def test_accumulated_micro_batches_equal_one_large_batch():
    small, large = Toy(), Toy()
    a = train(small, batch_size=4, accumulation_steps=3, learning_rate=0.3, local_epochs=2)
    b = train(large, batch_size=12, learning_rate=0.3, local_epochs=2)
    torch.testing.assert_close(small.linear.weight, large.linear.weight, rtol=1e-12, atol=0)
    assert a.steps == b.steps == 8
    assert a.loss == pytest.approx(b.loss, rel=1e-12)


def test_the_learning_rate_follows_the_schedule_over_the_whole_run():
    assert schedule_factor("constant", 0.7) == 1.0
    assert schedule_factor("linear", 0.25) == 0.75
    assert schedule_factor("cosine", 0.5) == pytest.approx(0.5)
    # One round of one step in the middle of a run on a linear schedule: half the rate.
    half, full = Toy(), Toy()
    train(half, batch_size=40, learning_rate=1.0, schedule="linear", progress=0.5, round_share=0.1)
    train(full, batch_size=40, learning_rate=0.5)
    torch.testing.assert_close(half.linear.weight, full.linear.weight, rtol=1e-12, atol=0)


def test_the_proximal_term_is_the_gradient_of_half_mu_times_the_squared_distance():
    model, oracle = Toy(), Toy()
    mu, rate = 0.7, 0.4
    train(model, batch_size=40, local_epochs=3, learning_rate=rate, proximal_mu=mu)
    pixels, labels = (torch.from_numpy(a) for a in toy_data(40))
    start = [p.detach().clone() for p in oracle.parameters()]
    for _ in range(3):
        loss = cross_entropy(oracle(pixels), labels) + mu / 2 * sum(
            ((p - s) ** 2).sum() for p, s in zip(oracle.parameters(), start, strict=True)
        )
        gradients = torch.autograd.grad(loss, list(oracle.parameters()))
        with torch.no_grad():
            for p, g in zip(oracle.parameters(), gradients, strict=True):
                p -= rate * g
    torch.testing.assert_close(model.linear.weight, oracle.linear.weight, rtol=1e-10, atol=1e-14)


def test_clipping_bounds_the_step():
    model = Toy()
    train(model, batch_size=40, learning_rate=1.0, max_grad_norm=0.01)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]).norm().item()
    assert moved == pytest.approx(0.01, rel=1e-4)


def test_the_same_seed_draws_the_same_order_and_dropout_and_another_seed_does_not():
    runs = [Toy(dropout=0.5) for _ in range(3)]
    for model, seed in zip(runs, (1, 1, 2), strict=True):
        train(model, batch_size=8, learning_rate=0.3, seed=seed)
    assert torch.equal(runs[0].linear.weight, runs[1].linear.weight)
    assert not torch.equal(runs[0].linear.weight, runs[2].linear.weight)


def test_each_step_draws_another_dropout_mask():
    keys = []

    class Recorder(Toy):
        def set_dropout_key(self, key):
            keys.append(key)

    train(Recorder(), batch_size=10, accumulation_steps=2, local_epochs=2)
    assert keys[-1] is None  # what comes after training draws freely again
    assert len(set(keys)) == len(keys) == 9


def test_every_example_is_seen_once_an_epoch():
    seen = []

    class Recorder(Toy):
        def forward(self, pixels):
            seen.extend(pixels[:, 0, 0, 0].tolist())
            return super().forward(pixels)

    pixels, labels = toy_data(50)
    pixels[:, 0, 0, 0] = np.arange(50)
    settings = LocalSettings(local_epochs=2, batch_size=7)
    local_train(Recorder(), pixels, labels, np.arange(10, 50), settings, seed=3, device=CPU)
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(10, 50))
    assert seen[:40] != seen[40:]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(precision):
    model = Toy(dtype=torch.float32)
    first = train(model, batch_size=10, learning_rate=0.5, precision=precision).loss
    last = train(model, batch_size=10, learning_rate=0.5, precision=precision).loss
    assert last < first
    assert model.linear.weight.dtype == torch.float32


def test_a_loss_that_is_not_a_number_is_an_error_with_advice():
    model = Toy()
    with torch.no_grad():
        model.linear.bias[0] = float("nan")
    with pytest.raises(TrainingFailed, match=r"nan.*learning_rate"):
        train(model)


def test_a_step_that_fp16_leaves_out_has_no_rate():
    """Images a million times as bright: the scaled gradient is no number of fp16."""
    kw = {"batch_size": 10, "learning_rate": 0.5, "precision": "fp16"}
    assert train(Toy(dtype=torch.float32), **kw).rate_sum == 4 * 0.5

    class Loud(Toy):
        def forward(self, pixels):
            logits = super().forward(pixels)
            # The first two steps of four overflow.
            self.calls = getattr(self, "calls", 0) + 1
            return logits * 1e38 if self.calls <= 2 else logits

    result = train(Loud(dtype=torch.float32), **kw)
    assert (result.rate_sum, result.steps) == (2 * 0.5, 4)
