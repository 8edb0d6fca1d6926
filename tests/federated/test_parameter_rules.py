"""Full fine-tuning: what decays, and how far the temperature may rise."""

import math

import numpy as np
import pytest
import torch

from fedclip.federated.client import local_train
from fedclip.federated.local_steps import LocalSettings
from fedclip.federated.parameter_rules import decays
from fedclip.models.clip import create_clip_model
from tests.support.models import FULL, NAMES
from tests.support.small import SMALL

LR = 0.01


@pytest.fixture
def model():
    return create_clip_model(FULL | {"model_name": SMALL}, class_names=NAMES)


def train(model, **settings):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    settings = LocalSettings(batch_size=3, learning_rate=LR, **settings)
    labels = np.arange(6) % len(NAMES)
    local_train(model, pixels, labels, np.arange(6), settings, seed=0, device=torch.device("cpu"))


def test_norms_biases_and_the_temperature_do_not_decay(model):
    shapes = {name: p.shape for name, p in model.trainable().items()}
    told = ("norm", "bias", "logit_scale", "class_embedding", "layrnorm")
    for name, shape in shapes.items():
        assert decays(shape) is not any(word in name for word in told), name
    assert sum(map(decays, shapes.values())) >= 10


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_decay_pulls_at_matrices_only(model, optimizer):
    """Rates of zero but for the decay would hide it: clip the gradients away instead."""
    before = {name: p.detach().clone() for name, p in model.trainable().items()}
    train(model, optimizer=optimizer, weight_decay=0.5, max_grad_norm=1e-30)
    for name, p in model.trainable().items():
        left = (1 - LR * 0.5) ** 2 if p.ndim > 1 else 1.0  # two steps
        torch.testing.assert_close(p.detach(), left * before[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("start", [5.0, 4.6])
def test_the_temperature_is_clamped_as_clip_does(model, start):
    scale = model.trainable()["logit_scale"]
    with torch.no_grad():
        scale.fill_(start)
    train(model, optimizer="sgd", weight_decay=0.0, max_grad_norm=None)
    assert scale.item() <= math.log(100) + 1e-6
    with torch.no_grad():
        scale.fill_(3.0)
    train(model, optimizer="sgd", weight_decay=0.0, max_grad_norm=1e-30)
    assert scale.item() == 3.0
