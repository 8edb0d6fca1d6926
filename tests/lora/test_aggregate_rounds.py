"""The algebra at work: in a CLIP's forward pass, over rounds, on the wire, in one step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import pytest
import torch

from fedclip.lora import aggregate as algebra
from fedclip.lora.aggregate import StackedLora
from fedclip.lora.factors import Factors, norm
from fedclip.lora.names import pair_of
from fedclip.models.clip import CLIPLoRAWrapper, create_clip_model
from fedclip.models.peft_lora import lora_layers
from tests.support.algebra import distance, exact_mean, seeded
from tests.support.models import NAMES, shaken, some_pixels
from tests.support.small import SMALL

T = TypeVar("T")
SCALING = 1.5
TARGETS = {"vision_encoder": ["q_proj", "fc1", "fc2"], "text_encoder": ["out_proj"]}


def clip() -> CLIPLoRAWrapper:
    lora = {"r": 2, "lora_alpha": 2 * SCALING, "lora_dropout": 0.0, "target_modules": TARGETS}
    config = {"model_name": SMALL, "lora": lora}
    return create_clip_model(config, class_names=NAMES, seed=1).eval()


def logits(model: CLIPLoRAWrapper) -> torch.Tensor:
    with torch.no_grad():
        return model(some_pixels())


@pytest.fixture(scope="module")
def cohort() -> dict[str, StackedLora]:
    """Three clients' updates of a CLIP, by layer."""
    model = clip()
    states = [{name: 4 * t for name, t in shaken(model, seed).items()} for seed in range(3)]
    layers = {}
    for layer in lora_layers(model.network):
        a, b = (torch.stack([s[name] for s in states]) for name in pair_of(layer))
        layers[layer] = StackedLora(a, b, torch.tensor([5, 1, 2]), torch.full((3,), SCALING))
    return layers


def changed(
    adapters: Mapping[str, Factors], corrections: Mapping[str, torch.Tensor]
) -> CLIPLoRAWrapper:
    """The CLIP with these adapters, and corrections added to the weights underneath."""
    model = clip()
    state = model.get_parameters()
    for layer, module in lora_layers(model.network).items():
        if layer in adapters:
            state |= dict(zip(pair_of(layer), adapters[layer], strict=True))
        if layer in corrections:
            module.get_base_layer().weight.data += corrections[layer]
    model.set_parameters(state)
    return model


def by_layer(
    cohort: Mapping[str, StackedLora], function: Callable[[StackedLora], T]
) -> dict[str, T]:
    return {layer: function(x) for layer, x in cohort.items()}


def mean_of(x: StackedLora) -> Factors:
    return algebra.mean_of_factors(x, scaling=SCALING)


def missed_by(x: StackedLora) -> torch.Tensor:
    return algebra.residual(x, scaling=SCALING).product()


def test_logits_with_the_aggregate_are_those_with_the_exact_mean(
    cohort: dict[str, StackedLora],
) -> None:
    # B of a fresh adapter is zero, so the mean alone changes the weights here.
    expected = logits(changed({}, by_layer(cohort, lambda x: exact_mean(x).float())))
    means, missed = by_layer(cohort, mean_of), by_layer(cohort, missed_by)
    assert distance(logits(clip()), expected) > 1e-2
    assert distance(logits(changed(means, missed)), expected) <= 1e-5
    assert distance(logits(changed(means, {})), expected) > 1e-3
    turned = {n: t.T if t.shape[0] == t.shape[1] else t for n, t in missed.items()}
    assert distance(logits(changed(means, turned)), expected) > 1e-3
    whole = by_layer(cohort, lambda x: algebra.truncated_mean(x, 6).product())
    assert distance(logits(changed({}, whole)), expected) <= 1e-5


def test_what_is_not_adapted_stays_bit_for_bit(cohort: dict[str, StackedLora]) -> None:
    after = changed(by_layer(cohort, mean_of), by_layer(cohort, missed_by))
    touched = 0
    pairs = zip(clip().network.named_parameters(), after.network.parameters(), strict=True)
    for (name, old), new in pairs:
        adapted = any(layer in name for layer in cohort) and not name.endswith("bias")
        touched += adapted
        assert torch.equal(old, new) != adapted, name
    assert touched == 3 * len(cohort)  # the weight, A and B of each


def test_rounds_with_a_late_joiner_add_up() -> None:
    """FedEx for six rounds: base and adapter together are always the centrally kept weight."""
    generator = seeded()

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base, adapter = draw(6, 9), Factors(draw(2, 9), torch.zeros(6, 2, dtype=torch.float64))
    central, residuals = base.clone(), []
    for server_round in range(6):
        clients = 3 if server_round < 4 else 4  # one joins for the last two rounds
        own_base = base + sum(r.product() for r in residuals)
        assert distance(own_base + SCALING * adapter.product(), central) <= 1e-12
        a, b = adapter.a + 0.3 * draw(clients, 2, 9), adapter.b + 0.3 * draw(clients, 6, 2)
        x = StackedLora(a, b, torch.arange(1, clients + 1), torch.full((clients,), SCALING))
        # What the clients' weights are, averaged as if they had been sent whole.
        shares = torch.arange(1, clients + 1).double() / (clients * (clients + 1) / 2)
        central = sum(
            p * (own_base + SCALING * v @ u) for p, u, v in zip(shares, a, b, strict=True)
        )
        adapter = algebra.mean_of_factors(x, scaling=SCALING)
        residuals.append(algebra.residual(x, scaling=SCALING))
    # Whoever comes now needs one sum, in factors or dense.
    together = Factors(torch.cat([r.a for r in residuals]), torch.cat([r.b for r in residuals], 1))
    late = base + together.product() + SCALING * adapter.product()
    assert distance(late, central) <= 1e-12
    assert distance(base + SCALING * adapter.product(), central) > 1e-2
    assert norm(together) > 0.1


def test_a_frozen_factor_stays_bit_for_bit() -> None:
    generator = seeded()
    a = torch.randn(2, 5, generator=generator)

    def digest(t: torch.Tensor) -> str:
        return hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()

    start = digest(a)
    for _ in range(20):
        b = torch.randn(7, 6, 2, generator=generator)
        weights = torch.rand(7, generator=generator) + 0.1
        mean = algebra.mean_of_factors(
            StackedLora(a.expand(7, 2, 5), b, weights, torch.full((7,), 0.3)), scaling=0.3
        )
        a = mean.a
        assert digest(a) == start


def test_half_precision_on_the_wire_costs_its_rounding_and_is_never_summed() -> None:
    generator = seeded()
    a = torch.randn(4, 8, 64, generator=generator)
    b = torch.randn(4, 48, 8, generator=generator)
    weights, scalings = torch.tensor([1, 2, 3, 4]), torch.full((4,), 0.5)
    with pytest.raises(ValueError, match=r"float32 or both float64, got torch\.float16"):
        StackedLora(a.half(), b.half(), weights, scalings)
    sent = StackedLora(a.half().float(), b.half().float(), weights, scalings)
    whole = algebra.stack(StackedLora(a, b, weights, scalings)).product()
    found = algebra.stack(sent).product()
    assert found.dtype == torch.float32
    assert 1e-5 < distance(found, whole) <= 2**-10


def test_one_step_on_b_is_the_same_for_every_method() -> None:
    """From B = 0, a step of each client on its part is a central step on all."""
    generator = seeded()

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, start, inputs, targets = draw(4, 6), draw(2, 6), draw(12, 6), draw(12, 4)

    def step(rows: slice) -> Factors:
        a = start.clone().requires_grad_()
        b = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
        outputs = inputs[rows] @ (weight + SCALING * b @ a).T
        (outputs - targets[rows]).square().sum(dim=1).mean().backward()
        assert a.grad is not None
        assert b.grad is not None
        return Factors((a - 0.1 * a.grad).detach(), (b - 0.1 * b.grad).detach())

    central = step(slice(None))
    assert torch.equal(central.a, start)  # no gradient while B is zero
    assert central.b.norm() > 0.1
    for parts in ([slice(None)], [slice(0, 7), slice(7, 12)]):
        done = [step(part) for part in parts]
        sizes = torch.tensor([len(inputs[part]) for part in parts])
        scalings = torch.full((len(parts),), SCALING, dtype=torch.float64)
        x = StackedLora(
            torch.stack([f.a for f in done]), torch.stack([f.b for f in done]), sizes, scalings
        )
        mean = algebra.mean_of_factors(x, scaling=SCALING)
        assert torch.equal(mean.a, start)
        assert distance(mean.b, central.b) <= 1e-12
        expected = SCALING * central.product()
        for product in (
            SCALING * mean.product(),
            algebra.stack(x).product(),
            algebra.truncated_mean(x, 2).product(),
            SCALING * algebra.corrected_mean(x, scaling=SCALING, ridge=0.01).product(),
        ):
            assert distance(product, expected) <= 1e-12
        assert algebra.residual(x, scaling=SCALING).product().norm() <= 1e-12
