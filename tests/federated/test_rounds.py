"""The round loop: who takes part, in which order, and that it may start anywhere."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedclip.errors import TrainingFailed, UsageError
from fedclip.federated.engines.sequential import SequentialEngine
from fedclip.federated.local_steps import LocalSettings
from fedclip.federated.rounds import run_rounds, sample_clients, update_norm
from fedclip.federated.strategies import FedAvg, create_strategy
from fedclip.records import RunState
from fedclip.seeding import seed_for
from tests.support.toys import CPU, Toy, toy_data

CLIENTS = {"a": np.arange(0, 10), "b": np.arange(10, 40), "c": np.arange(40, 60)}
SETTINGS = LocalSettings(optimizer="adamw", learning_rate=0.05, batch_size=8, schedule="cosine")


def engine(model, clients=CLIENTS, settings=SETTINGS, seed=5):
    pixels, labels = toy_data(60)
    return SequentialEngine(model, pixels, labels, clients, settings, seed=seed, device=CPU)


def rounds(
    model=None, clients=CLIENTS, state=None, *, count=3, seed=5, settings=SETTINGS, plan=False, **kw
):
    model = model or Toy()
    state = state or {n: p.detach().clone() for n, p in model.trainable().items()}
    sizes = {c: len(i) for c, i in clients.items()}
    loop = engine(model, clients, settings, seed)
    kw = {"clients_per_round": len(clients), "settings": settings if plan else None} | kw
    return list(
        run_rounds(RunState(state), loop, FedAvg(), clients=sizes, rounds=count, seed=seed, **kw)
    )


def test_clients_are_sampled_without_replacement_and_largest_first():
    sizes = {f"c{i}": i % 3 + 1 for i in range(9)}
    for server_round in range(20):
        drawn = sample_clients(sizes, 4, server_round, seed=1)
        assert len(set(drawn)) == 4
        assert list(drawn) == sorted(drawn, key=lambda c: (-sizes[c], c))
    everyone = {sample_clients(sizes, 4, r, seed=1) for r in range(20)}
    assert len(everyone) > 10
    assert sample_clients(sizes, 4, 3, seed=1) == sample_clients(sizes, 4, 3, seed=1)


def test_one_client_is_centralised_training_with_the_optimizer_reset_each_round():
    """The loop below knows nothing of the library but its named seeds."""
    pixels, labels = toy_data(60)
    clients = {"only": np.arange(60)}
    oracle, total = Toy(), 3
    for server_round in range(1, total + 1):
        groups = [  # a bias does not decay
            {"params": [p for p in oracle.parameters() if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for p in oracle.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.05)
        seed = seed_for(5, "client", server_round, "only")
        order = np.random.default_rng(seed_for(seed, "order", 0)).permutation(60)
        steps = [order[i : i + 8] for i in range(0, 60, 8)]
        for step, batch in enumerate(steps):
            share = (server_round - 1 + step / len(steps)) / total
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * 0.5 * (1 + np.cos(np.pi * share))
            optimizer.zero_grad()
            cross_entropy(
                oracle(torch.from_numpy(pixels[batch])), torch.from_numpy(labels[batch])
            ).backward()
            torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
            optimizer.step()
    result = rounds(clients=clients, count=total)[-1]
    for name, parameter in oracle.trainable().items():
        torch.testing.assert_close(
            result.state.shared[name], parameter.detach(), rtol=1e-6, atol=1e-12
        )


def test_a_round_is_the_weighted_mean_of_clients_trained_alone():
    alone = {
        c: next(iter(engine(Toy()).train(_request(c)))).tensors["linear.weight"][0] for c in CLIENTS
    }
    expected = (10 * alone["a"] + 30 * alone["b"] + 20 * alone["c"]) / 60
    together = rounds(count=3)[0].state.shared["linear.weight"]
    torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-15)


def _request(client_id):
    from fedclip.records import TrainRequest

    state = {n: p.detach().clone() for n, p in Toy().trainable().items()}
    return TrainRequest(1, (client_id,), state, progress=0.0, round_share=1 / 3)


def test_a_loop_that_starts_again_takes_the_same_steps():
    whole = rounds(count=4, clients_per_round=2)
    tail = rounds(state=whole[1].state.shared, count=4, clients_per_round=2, finished_rounds=2)
    assert [r.server_round for r in tail] == [3, 4]
    for name, tensor in whole[-1].state.shared.items():
        assert torch.equal(tensor, tail[-1].state.shared[name])
    assert [[r.client_id for r in x.reports] for x in whole[2:]] == [
        [r.client_id for r in x.reports] for x in tail
    ]


def test_reports_reach_the_caller_as_they_come():
    heard = []
    result = rounds(count=1, on_client=lambda r: heard.append(r.client_id))[0]
    assert heard == ["b", "c", "a"]
    assert result.loss == pytest.approx(
        sum(r.loss * r.num_examples for r in result.reports) / 60, rel=1e-12
    )


def test_a_round_tells_its_learning_rate_and_the_norm_of_its_update():
    """A cosine over three rounds begins them at 1, 3/4 and 1/4 of the rate."""
    model = Toy()
    states = [{n: p.detach().clone() for n, p in model.trainable().items()}]
    for result in rounds(model, plan=True):
        change = [result.state.shared[n] - states[-1][n] for n in states[-1]]
        expected = torch.cat([c.flatten() for c in change]).norm().item()
        assert result.update_norm == pytest.approx(expected, rel=1e-12)
        assert expected > 0
        share = (1, 0.75, 0.25)[result.server_round - 1]
        assert result.learning_rate == pytest.approx(0.05 * share)
        states.append(result.state.shared)


def test_the_norm_of_groups_is_that_of_all_and_there_is_none_of_what_is_folded():
    def state(*numbers, **more):
        return RunState({"x": torch.tensor(numbers)}, **more)

    before = state(0.0, groups={"a": state(1.0), "b": state(1.0)})
    after = state(0.0, groups={"a": state(4.0), "b": state(5.0)})
    assert update_norm(before, after) == 5.0
    assert update_norm(state(1.0), after) == 5.0  # groups begin with what all share
    assert update_norm(state(1.0), state(1.0, 2.0)) is None
    assert update_norm(state(1.0), state(2.0, shift={"w": torch.ones(1)})) is None


def test_training_lowers_the_loss():
    results = rounds(count=8)
    assert results[-1].loss < 0.8 * results[0].loss


def test_a_failed_client_is_named():
    state = {n: torch.full_like(p, float("nan")) for n, p in Toy().trainable().items()}
    with pytest.raises(TrainingFailed, match=r"client b, round 1: .*nan"):
        rounds(state=state, count=1)


def test_an_unknown_strategy_names_the_known_ones():
    with pytest.raises(
        UsageError, match=r"must be one of fedavg, .*got 'fedavgg'; did you mean fedavg"
    ):
        create_strategy("fedavgg")
