"""What goes around a strategy: SCAFFOLD, Ditto, server optimizers, dynamic ranks."""

import math
from dataclasses import replace

import pytest
import torch

from fedclip.errors import UsageError
from fedclip.federated.strategies import create_strategy
from fedclip.federated.strategies.dynamic_ranks import DynamicRanks, RankPlan
from fedclip.federated.strategies.server_optimizers import server_step
from fedclip.federated.strategies.wrappers import Ditto, Scaffold, ServerOptimizer
from fedclip.federated.updates import Updates
from fedclip.lora.factors import svd
from fedclip.records import ClientReport, Cohort, RunState, TrainRequest
from tests.support.strategies import (
    RANK,
    RATE_SUM,
    SCALING,
    SIDES,
    SIZES,
    exact_mean,
    model_update,
    names,
    rounds,
    setting,
    start,
)

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
OPTIONS = {"learning_rate": 0.5, "beta1": 0.9, "beta2": 0.99, "tau": 0.1}


def test_scaffold_by_hand():
    """One number, two clients with 1 and 3 of all 8 examples, w = 1, rate sums 0.5.

    y = (0.5, 0.9): mean 0.8. From zero control: c_a = (1 - 0.5) / 0.5 = 1, c_b = 0.2, and
    c = 1 / 8 + 3 * 0.2 / 8 = 0.2. Then offsets c - c_i are -0.8 and 0.
    """
    sent = iter([[0.5, 0.9], [0.8, 0.8]])
    asked = []

    def train(request):
        asked.append(request)
        y = torch.tensor(next(sent), dtype=torch.float64)[:, None]
        reports = [ClientReport(c, n, 0.1, 5, 0.0, 0.5) for c, n in (("a", 1), ("b", 3))]
        return Updates(request, [Cohort(tuple(reports), {"w": y})])

    strategy = Scaffold(create_strategy("fedavg"), total_examples=8)
    state = RunState({"w": torch.ones(1, dtype=torch.float64)})
    state = strategy.round(state, TrainRequest(1, ("a", "b"), state.shared), train)
    assert state.shared["w"].item() == pytest.approx(0.8, rel=1e-12)
    assert state.private["a"]["control/w"].item() == pytest.approx(1.0, rel=1e-12)
    assert state.private["b"]["control/w"].item() == pytest.approx(0.2, rel=1e-12)
    assert state.server["control/w"].item() == pytest.approx(0.2, rel=1e-12)
    state = strategy.round(state, TrainRequest(2, ("a", "b"), state.shared), train)
    offsets = asked[1].offsets
    assert offsets["a"]["w"].item() == pytest.approx(-0.8, rel=1e-12)
    assert offsets["b"]["w"].item() == pytest.approx(0, abs=1e-12)
    # Nobody moved from 0.8: c_i' = c_i - c.
    assert state.private["a"]["control/w"].item() == pytest.approx(0.8, rel=1e-12)


def quadratic(optima, steps, mu):
    """Clients of 1 to 4 examples that take SGD steps on |x - m_i|^2 / 2 + mu / 2 |x - start|^2."""
    rate = 0.05

    def train(request):
        reports, ends = [], []
        for i, client in enumerate(request.client_ids):
            w0 = w = request.state["w"]
            for _ in range(steps[i]):
                pull = mu * (w - w0) + request.offsets.get(client, {}).get("w", 0)
                w = w - rate * (w - optima[client] + pull)
            ends.append(w)
            reports.append(ClientReport(client, i + 1, 0.1, steps[i], 0.0, steps[i] * rate))
        return Updates(request, [Cohort(tuple(reports), {"w": torch.stack(ends)})])

    return train


@pytest.mark.parametrize("mu", [0.0, 0.5], ids=["FedAvg", "FedProx"])
@pytest.mark.parametrize("scaffold", [False, True])
def test_the_optimum_of_a_convex_problem_is_that_of_all_examples(scaffold, mu):
    """The mean of the m_i by examples; control variates find it even where steps are unequal."""
    clients = ("a", "b", "c", "d")
    optima = {c: torch.tensor([float(i**2), -float(i)]) for i, c in enumerate(clients)}
    best = sum((i + 1) * m for i, m in enumerate(optima.values())) / 10
    train = quadratic(optima, (1, 3, 5, 7) if scaffold else (3, 3, 3, 3), mu)
    strategy = create_strategy("fedavg")
    strategy = Scaffold(strategy, total_examples=10) if scaffold else strategy
    state = RunState({"w": torch.zeros(2)})
    for server_round in range(1, 400):
        state = strategy.round(state, TrainRequest(server_round, clients, state.shared), train)
    assert torch.allclose(state.shared["w"], best, atol=1e-3)


def test_scaffold_sends_twice_as_much():
    plain, _ = rounds("fedit", state=start(dtype=torch.float32))
    around = Scaffold(create_strategy("fedit", setting()), total_examples=sum(SIZES.values()))
    results, _ = rounds(around, state=start(dtype=torch.float32))
    assert results[0].bytes_down == 2 * plain[0].bytes_down
    assert results[0].bytes_up == 2 * plain[0].bytes_up


def test_ditto_trains_a_personal_model_pulled_to_the_one_received():
    strategy = Ditto(create_strategy("fedit", setting()), mu=0.3)
    results, engine = rounds(strategy, count=2)
    plain, _ = rounds("fedit", count=2)
    shared, personal = engine.requests[2:]
    assert (shared.purpose, personal.purpose) == ("client", "personal")
    assert personal.proximal_mu == 0.3
    for name in start():
        assert torch.equal(personal.anchor[name], results[0].state.shared[name])
        # The shared model is as without Ditto, and traffic too.
        assert torch.equal(results[1].state.shared[name], plain[1].state.shared[name])
        assert torch.equal(
            results[1].state.of("a")[name], engine.sent[2, "a"][name]
        )  # sent last: the personal one
    assert results[1].bytes_up == plain[1].bytes_up
    assert [r.client_id for r in results[1].reports] == [r.client_id for r in plain[1].reports]


def test_ditto_and_scaffold_keep_their_private_tensors_apart():
    inner = Scaffold(create_strategy("fedit", setting()), total_examples=sum(SIZES.values()))
    results, engine = rounds(Ditto(inner, mu=0.1), count=2)
    own = results[1].state.private["a"]
    assert {name.startswith("control/") for name in own} == {True, False}
    assert not any(name.startswith("control/") for name in engine.requests[3].starts["a"])


def server_rounds(name, gradients):
    values = {"w": torch.tensor([1.0], dtype=torch.float64)}
    memory, seen = {}, []
    for gradient in gradients:
        g = {"w": torch.tensor([gradient], dtype=torch.float64)}
        values, new = server_step(name, values, g, memory, OPTIONS)
        memory |= new
        seen.append(values["w"].item())
    return seen


def test_server_optimizers_by_hand():
    # Momentum 0.9: velocities 0.4 and 0.9 * 0.4 + 0.2 = 0.56, rate 0.5.
    assert server_rounds("avgm", [0.4, 0.2]) == pytest.approx([0.8, 0.52], rel=1e-12)
    # Algorithm 2: m = 0.1 * 0.4 = 0.04, then 0.9 * 0.04 + 0.1 * 0.2 = 0.056; v from tau^2 = 0.01:
    squares = {
        "adagrad": (0.01 + 0.16, 0.17 + 0.04),
        "adam": (0.99 * 0.01 + 0.01 * 0.16, 0.99 * 0.0115 + 0.01 * 0.04),
        "yogi": (0.01 + 0.01 * 0.16, 0.0116 + 0.01 * 0.04),  # g^2 is above v both times
    }
    for name, (v1, v2) in squares.items():
        first = 1 - 0.5 * 0.04 / (v1**0.5 + 0.1)
        second = first - 0.5 * 0.056 / (v2**0.5 + 0.1)
        assert server_rounds(name, [0.4, 0.2]) == pytest.approx([first, second], rel=1e-12)
    # Yogi takes from v where g^2 is below it: 0.0116 - 0.01 * 0.0001.
    (_, second), m = server_rounds("yogi", [0.4, 0.01]), 0.9 * 0.04 + 0.1 * 0.01
    first = 1 - 0.5 * 0.04 / (0.0116**0.5 + 0.1)
    assert second == pytest.approx(first - 0.5 * m / (0.011599**0.5 + 0.1), rel=1e-12)


def test_a_server_optimizer_keeps_the_temperature_as_clip_does():
    """A long step towards ever sharper logits ends at ln 100."""
    options = OPTIONS | {"learning_rate": 50.0}

    def train(request):
        report = ClientReport("a", 1, 0.1, 1, 0.0, 0.5)
        return Updates(request, [Cohort((report,), {"logit_scale": torch.tensor([4.4])})])

    state = RunState({"logit_scale": torch.tensor(4.0)})
    strategy = ServerOptimizer(create_strategy("fedavg"), "adam", options)
    after = strategy.round(state, TrainRequest(1, ("a",), state.shared), train)
    assert after.shared["logit_scale"].item() == pytest.approx(math.log(100), rel=1e-6)


def test_an_unknown_server_optimizer_names_the_known():
    with pytest.raises(UsageError, match=r"must be one of avgm, .*got 'lion'"):
        server_rounds("lion", [0.1])


def test_full_momentumless_steps_of_rate_one_are_fedavg():
    options = OPTIONS | {"learning_rate": 1.0, "beta1": 0.0}
    around = ServerOptimizer(create_strategy("fedit", setting()), "avgm", options)
    results, _ = rounds(around, count=2)
    plain, _ = rounds("fedit", count=2)
    for name, tensor in plain[1].state.shared.items():
        torch.testing.assert_close(results[1].state.shared[name], tensor, **TIGHT)


@pytest.mark.parametrize("inner", ["rolora", "ffa"])
def test_a_server_optimizer_moves_only_what_was_trained(inner):
    around = ServerOptimizer(create_strategy(inner, setting()), "adam", OPTIONS)
    results, _ = rounds(around, count=3)
    a, _ = names(next(iter(SIDES)))
    # A is frozen in rounds 1 and 3 of RoLoRA, and always in FFA.
    assert torch.equal(results[0].state.shared[a], start()[a])
    assert torch.equal(results[2].state.shared[a], results[1].state.shared[a])


def test_server_memory_survives_being_written_down():
    def around():
        return ServerOptimizer(create_strategy("fedit", setting()), "adam", OPTIONS)

    whole, _ = rounds(around(), count=4)
    again = RunState.from_flat(whole[1].state.flat())
    tail, _ = rounds(around(), count=2, total=4, state=again, finished_rounds=2)
    for name, tensor in whole[3].state.shared.items():
        assert torch.equal(tensor, tail[1].state.shared[name])


# --- dynamic ranks ---


def dynamic(rounds_in_all, exact=False, **kw):
    plan = {"warmup": 0.0, "cooldown": 0.0, "minimum": 1, "hysteresis": 0.0} | kw
    return DynamicRanks(setting(), RankPlan(rounds_in_all, **plan), exact=exact)


@pytest.mark.parametrize("exact", [False, True])
def test_ranks_follow_the_energy_of_the_exact_mean(exact):
    results, engine = rounds(dynamic(1, exact, energy=0.6, budget=1.0))
    state = results[0].state
    for layer in SIDES:
        u, s, vh = torch.linalg.svd(exact_mean(engine, layer))
        share = s.square().cumsum(0) / s.square().sum()
        rank = min(RANK, int((share < 0.6).sum()) + 1)
        assert state.server[f"rank/{layer}"].item() == rank
        expected = u[:, :rank] * s[:rank] @ vh[:rank]
        torch.testing.assert_close(model_update(state, layer), expected, **TIGHT)
        a, b = names(layer)
        assert torch.count_nonzero(state.shared[a][rank:]) == 0
        assert torch.count_nonzero(state.shared[b][:, rank:]) == 0


@pytest.mark.parametrize("schedule", ["energy", "importance"])
def test_the_budget_holds_and_only_what_is_held_travels(schedule):
    plan = dynamic(3, energy=1.0, budget=0.5, schedule=schedule)
    results, engine = rounds(plan, count=3, state=start(dtype=torch.float32))
    last = results[-1]
    ranks = {layer: int(last.state.server[f"rank/{layer}"].item()) for layer in SIDES}
    assert sum(ranks.values()) == int(0.5 * RANK * len(SIDES))
    expected = sum(4 * ranks[layer] * sum(sides) for layer, sides in SIDES.items())
    assert last.bytes_down == len(SIZES) * expected
    before = {n: int(results[1].state.server[f"rank/{n}"].item()) for n in SIDES}
    sent = sum(4 * before[layer] * sum(sides) for layer, sides in SIDES.items())
    assert last.bytes_up == len(SIZES) * sent
    assert engine.requests[-1].cut.keys() == start().keys()


def test_a_layer_can_grow_again_without_losing_what_was_learnt():
    """A state cut to rank 1 whose clients bring new directions gets its rank back."""
    state = start()
    for layer in SIDES:
        state[names(layer)[0]][1:] = 0
    kept = RunState(state, server={f"rank/{n}": torch.tensor(1.0) for n in SIDES})
    results, engine = rounds(dynamic(1, energy=1.0, budget=1.0), state=kept)
    assert engine.requests[0].cut == dict.fromkeys(state, 1)
    for layer in SIDES:
        assert results[0].state.server[f"rank/{layer}"].item() == RANK


def test_fresh_rows_are_there_to_grow_into():
    """Where the mean has one direction and the rank is two, A's second row is drawn, B's zero."""
    layer = next(iter(SIDES))
    a, b = names(layer)
    plan = dynamic(1, energy=1.0, budget=1.0, minimum=2)

    def train(request):
        one = {name: tensor.clone() for name, tensor in request.state.items()}
        one[a][1:] = 0
        one[b][:, 0] = 1.0
        report = ClientReport("a", 1, 0.1, 1, 0.0, RATE_SUM)
        return Updates(request, [Cohort((report,), {n: t[None] for n, t in one.items()})])

    only = {name: tensor for name, tensor in start().items() if name in (a, b)}
    state = RunState(only)
    strategy = replace_scalings(plan, layer)
    after = strategy.round(state, TrainRequest(1, ("a",), only), train)
    assert torch.count_nonzero(after.shared[b][:, 1:].abs() > 1e-12) == 0
    product = SCALING * torch.ones(12, 1, dtype=torch.float64) @ only[a][:1]
    torch.testing.assert_close(model_update(after, layer), product, rtol=1e-9, atol=1e-12)


def replace_scalings(strategy, layer):
    strategy.setting = replace(strategy.setting, scalings={layer: SCALING})
    return strategy


def test_scaffold_learns_nothing_of_a_client_that_took_no_step():
    def train(request):
        reports = (ClientReport("a", 1, 0.1, 5, 0.0, 0.5), ClientReport("b", 1, 0.1, 5, 0.0, 0.0))
        return Updates(request, [Cohort(reports, {"w": torch.tensor([[0.5], [1.0]])})])

    state = RunState({"w": torch.ones(1)})
    state = Scaffold(create_strategy("fedavg"), total_examples=2).round(
        state, TrainRequest(1, ("a", "b"), state.shared), train
    )
    assert "b" not in state.private
    assert state.server["control/w"].item() == 0.5  # c_a = 1, over two examples


@pytest.mark.parametrize(("schedule", "decomposed"), [("energy", 0), ("importance", 4)])
def test_spectra_are_taken_only_where_they_are_read(schedule, decomposed, monkeypatch):
    """No rank may change in the first round: only the importance is smoothed over all of them."""
    seen = []
    monkeypatch.setattr(
        "fedclip.federated.strategies.dynamic_ranks.svd", lambda x: seen.append(x) or svd(x)
    )
    plan = RankPlan(10, schedule=schedule, warmup=0.5)
    rounds(DynamicRanks(setting(), plan, exact=False), total=10)
    assert len(seen) == decomposed  # before and after, for each of two layers


@pytest.mark.parametrize("name", ["adagrad", "adam", "yogi"])
def test_first_steps_of_the_server_are_the_papers(name):
    """g far below tau: m = 0.1 g, v about tau^2, and a step of 0.1 g / (2 tau)."""
    options = {**OPTIONS, "learning_rate": 1.0, "tau": 1.0}
    g = torch.tensor([1e-4], dtype=torch.float64)
    stepped, _ = server_step(name, {"w": torch.zeros_like(g)}, {"w": g}, {}, options)
    assert -stepped["w"].item() == pytest.approx(0.1 * g.item() / 2, rel=3e-3)
