"""Bytes of a round: by hand, and equal to the tensors that the algebra makes."""

from __future__ import annotations

import pytest
import torch

from fedclip.catalog import STRATEGIES
from fedclip.federated.traffic import Layer, Traffic, bytes_per_round
from fedclip.lora import aggregate as algebra
from fedclip.lora.aggregate import StackedLora
from fedclip.lora.factors import orthonormal_rows, singular_frame
from tests.support.algebra import seeded

CLIP_B32 = [Layer(768, 768)] * 48 + [Layer(512, 512)] * 48
LAYERS = [Layer(9, 12), Layer(12, 9), Layer(11, 11)]
RANK, CLIENTS = 2, 3


@pytest.mark.parametrize(
    ("algorithm", "up", "down"),
    [
        # r * S = 8 * 122,880 = 983,040 values, half of them in either factor.
        ("fedit", 983_040, 983_040),
        ("flexlora", 983_040, 983_040),
        ("hetlora", 983_040, 983_040),
        ("lora_fair", 983_040, 983_040),
        ("ffa", 491_520, 491_520),
        ("rolora", 491_520, 491_520),
        ("fedsa", 491_520, 491_520),
        ("fedsvd", 491_520, 983_040),
        ("flora", 983_040, 9_830_400),
        # The mean, and 72 of each layer's sides: 9 * 983,040 more.
        ("fedex", 983_040, 9_830_400),
        ("fed_sb", 96 * 64, 96 * 64),
        # What is averaged tensor by tensor, or not at all.
        ("fedavg", 983_040, 983_040),
        ("qfedavg", 983_040, 983_040),
        ("centralised", 983_040, 983_040),
        ("local", 0, 0),
    ],
)
def test_clip_with_ten_clients(algorithm: str, up: int, down: int) -> None:
    assert bytes_per_round(algorithm, CLIP_B32, 8, 10) == Traffic(4 * up, 4 * down)
    half = bytes_per_round(algorithm, CLIP_B32, 8, 10, bytes_per_value=2)
    assert half == Traffic(2 * up, 2 * down)


def test_every_algorithm_is_worked_out_by_hand() -> None:
    marks = test_clip_with_ten_clients.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in marks[0].args[1]} == set(STRATEGIES)


def test_a_residual_goes_dense_where_that_is_smaller() -> None:
    # 100 clients: 99 * 8 = 792 columns of 768 + 768, or 768 * 768.
    found = bytes_per_round("fedex", [Layer(768, 768)], 8, 100)
    assert found.down == 4 * (8 * 2 * 768 + 768 * 768)
    assert bytes_per_round("fedex", [Layer(768, 768)], 8, 1) == Traffic(49_152, 49_152)


def test_layers_may_have_ranks_of_their_own() -> None:
    """3 rows of 5 + 7 and 2 of 4 + 6; cores of 9 and 4 numbers."""
    layers = [Layer(5, 7, 3), Layer(4, 6)]
    assert bytes_per_round("fedit", layers, 2, 2) == Traffic(4 * 56, 4 * 56)
    assert bytes_per_round("fed_sb", layers, 2, 2) == Traffic(4 * 13, 4 * 13)
    # The residual of two clients: as many rows again, dense where that is less (35 < 36).
    assert bytes_per_round("fedex", layers, 2, 2).down == 4 * (56 + 35 + 20)


def test_rolora_takes_turns() -> None:
    layer = [Layer(in_features=3, out_features=5)]
    odd, even = (bytes_per_round("rolora", layer, 2, 4, server_round=t) for t in (1, 2))
    assert odd == Traffic(4 * 2 * 5, 4 * 2 * 5)
    assert even == Traffic(4 * 2 * 3, 4 * 2 * 3)


def test_unknown_algorithms_name_the_known() -> None:
    with pytest.raises(ValueError, match="unknown algorithm 'fedavgg'; known: fedavg"):
        bytes_per_round("fedavgg", LAYERS, 2, 3)


def cohorts() -> list[StackedLora]:
    generator = seeded()
    return [
        StackedLora(
            torch.randn(CLIENTS, RANK, layer.in_features, generator=generator),
            torch.randn(CLIENTS, layer.out_features, RANK, generator=generator),
            torch.tensor([1, 2, 3]),
            torch.full((CLIENTS,), 0.5),
        )
        for layer in LAYERS
    ]


def nbytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_formulas_are_the_sizes_of_the_tensors() -> None:
    def formula(algorithm: str) -> Traffic:
        return bytes_per_round(algorithm, LAYERS, RANK, CLIENTS)

    means = [algebra.mean_of_factors(x, scaling=0.5) for x in cohorts()]
    both = nbytes([t for m in means for t in m])
    assert formula("fedit") == Traffic(both, both)
    assert formula("ffa") == Traffic(*[nbytes([m.b for m in means])] * 2)
    assert formula("fedsa") == Traffic(*[nbytes([m.a for m in means])] * 2)
    stacks = [t for x in cohorts() for t in algebra.stack(x)]
    assert formula("flora") == Traffic(both, nbytes(stacks))
    missed = [t for x in cohorts() for t in algebra.residual(x, scaling=0.5)]
    assert formula("fedex") == Traffic(both, both + nbytes(missed))
    flex = [t for x in cohorts() for t in algebra.truncated_mean(x, RANK)]
    assert formula("flexlora") == Traffic(both, nbytes(flex))
    fair = [t for x in cohorts() for t in algebra.corrected_mean(x, scaling=0.5, ridge=0.01)]
    assert formula("lora_fair") == Traffic(both, nbytes(fair))
    turned = [t for m in means for t in orthonormal_rows(m)]
    assert formula("fedsvd") == Traffic(nbytes([m.b for m in means]), nbytes(turned))
    cores = [singular_frame(algebra.stack(x), RANK)[1] for x in cohorts()]
    assert formula("fed_sb") == Traffic(nbytes(cores), nbytes(cores))
