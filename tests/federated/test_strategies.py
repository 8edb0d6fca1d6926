"""Each strategy against plain loops over what the clients sent, and what travels for it."""

import hashlib
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fedclip.catalog import STRATEGIES
from fedclip.errors import UsageError
from fedclip.federated.strategies import Setting, create_strategy
from fedclip.federated.traffic import Layer, bytes_per_round
from fedclip.records import RunState
from tests.support.strategies import (
    RANK,
    SCALING,
    SIDES,
    SIZES,
    DrawingEngine,
    exact_mean,
    model_update,
    names,
    rounds,
    setting,
    start,
)

EXACT = ["flora", "fedex", "ffa", "rolora", "fedsvd"]
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def client_mean(engine, name, server_round=1):
    total = sum(SIZES.values())
    return sum(n / total * engine.sent[server_round, c][name] for c, n in SIZES.items())


@pytest.mark.parametrize("strategy", EXACT)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_exact_strategies_give_the_mean_of_the_clients_models(strategy, count):
    """Over rounds too: what a client's model adds is the shift it starts from and its own BA."""
    results, engine = rounds(strategy, count=count)
    after = results[-1].state
    request = engine.requests[-1]
    for layer in SIDES:
        a, b = names(layer)
        total = sum(SIZES.values())
        expected = request.shift.get(layer, 0)
        for client, size in SIZES.items():
            own = {**request.state, **engine.sent[count, client]}
            expected = expected + size / total * SCALING * own[b] @ own[a]
        torch.testing.assert_close(model_update(after, layer), expected, **TIGHT)


@pytest.mark.parametrize("strategy", ["fedavg", "fedit"])
def test_fedit_averages_the_factors_and_misses_the_mean(strategy):
    results, engine = rounds(strategy)
    for layer in SIDES:
        for name in names(layer):
            expected = client_mean(engine, name)
            torch.testing.assert_close(results[0].state.shared[name], expected, **TIGHT)
        missed = (model_update(results[0].state, layer) - exact_mean(engine, layer)).norm()
        assert missed > 1e-3 * exact_mean(engine, layer).norm()


def test_flexlora_is_the_svd_of_the_exact_mean_cut_at_the_rank():
    results, engine = rounds("flexlora")
    for layer in SIDES:
        u, s, vh = torch.linalg.svd(exact_mean(engine, layer))
        expected = u[:, :RANK] * s[:RANK] @ vh[:RANK]
        torch.testing.assert_close(model_update(results[0].state, layer), expected, **TIGHT)


def test_lora_fair_comes_nearer_to_the_exact_mean_than_fedit():
    fair, engine = rounds("lora_fair", setting={"options": {"ridge": 0.0}})
    plain, _ = rounds("fedit")
    for layer in SIDES:
        exact = exact_mean(engine, layer)
        errors = [(model_update(r[0].state, layer) - exact).norm() for r in (fair, plain)]
        assert errors[0] < errors[1]
        a, _ = names(layer)
        torch.testing.assert_close(fair[0].state.shared[a], plain[0].state.shared[a], **TIGHT)


def test_ffa_never_touches_a():
    def digest(state):
        digests = hashlib.sha256()
        for layer in SIDES:
            digests.update(state.shared[names(layer)[0]].numpy().tobytes())
        return digests.hexdigest()

    results, engine = rounds("ffa", count=3)
    assert {digest(r.state) for r in results} == {digest(RunState(start()))}
    assert all(".lora_B." in name for sent in engine.sent.values() for name in sent)


def test_rolora_takes_turns_and_begins_with_b():
    _, engine = rounds("rolora", count=3)
    trained = [{name.split(".lora_")[1][0] for name in r.trained} for r in engine.requests]
    assert trained == [{"B"}, {"A"}, {"B"}]


def test_fedsvd_turns_a_into_orthonormal_rows():
    results, _ = rounds("fedsvd", count=2)
    for layer in SIDES:
        a = results[-1].state.shared[names(layer)[0]]
        torch.testing.assert_close(a @ a.T, torch.eye(RANK, dtype=a.dtype), **TIGHT)


def test_flora_starts_afresh_with_a_new_draw_each_round():
    results, _ = rounds("flora", count=2)
    a, b = names(next(iter(SIDES)))
    for result in results:
        assert torch.count_nonzero(result.state.shared[b]) == 0
        assert result.state.shared[a].abs().max() <= 7**-0.5
    assert not torch.equal(results[0].state.shared[a], results[1].state.shared[a])


def test_fed_sb_averages_cores_in_a_frame_that_stays():
    results, engine = rounds("fed_sb", count=3)
    first, second, third = (r.state for r in results)
    for layer in SIDES:
        _, b = names(layer)
        u, s, vh = torch.linalg.svd(exact_mean(engine, layer))
        cut = u[:, :RANK] * s[:RANK] @ vh[:RANK]
        torch.testing.assert_close(model_update(first, layer), cut, **TIGHT)
        frame = first.server[f"frame/{layer}"]
        assert torch.equal(frame, third.server[f"frame/{layer}"])
        core = client_mean(engine, b, 3)
        assert core.shape == (RANK, RANK)
        torch.testing.assert_close(third.shared[b], frame @ core, **TIGHT)
        assert torch.equal(second.shared[names(layer)[0]], third.shared[names(layer)[0]])


def test_fedsa_shares_a_and_keeps_b_with_its_client():
    results, engine = rounds("fedsa", count=2)
    state = results[-1].state
    a, b = names(next(iter(SIDES)))
    torch.testing.assert_close(state.shared[a], client_mean(engine, a, 2), **TIGHT)
    for client in SIZES:
        assert torch.equal(state.of(client)[b], engine.sent[2, client][b])
        assert torch.equal(engine.requests[1].start(client)[b], engine.sent[1, client][b])
        assert torch.equal(engine.requests[1].start(client)[a], results[0].state.shared[a])
    assert torch.count_nonzero(state.of("a newcomer")[b]) == 0


def test_local_training_goes_on_from_where_each_client_ended():
    results, engine = rounds("local", count=2)
    for client in SIZES:
        for name in start():
            assert torch.equal(engine.requests[1].start(client)[name], engine.sent[1, client][name])
            assert torch.equal(results[1].state.of(client)[name], engine.sent[2, client][name])
    assert (results[1].bytes_up, results[1].bytes_down) == (0, 0)


@pytest.mark.parametrize(
    ("rates", "expected"), [((0.3, 0.1), 1 - 2.25 * 8 / 165), ((0.15, 0.05), 1 - 2.25 * 16 / 570)]
)
def test_qfedavg_is_its_formula(rates, expected):
    """Two clients, one number: w = 1, w_1 = 0.8, w_2 = 0.4, F = 1.5 for both, q = 2.

    Rates sum to 0.3 and 0.1 in 2 steps each: their mean is 0.1, and L = 10. D = (2, 6); F^q = 2.25;
    sum of h = 2 * 1.5 * (4 + 36) + 2 * 10 * 2.25 = 165; w' = 1 - 2.25 * 8 / 165. Where a schedule
    has halved the rates: L = 20, D = (4, 12), sum of h = 3 * 160 + 2 * 20 * 2.25 = 570.
    """
    from fedclip.federated.updates import Updates
    from fedclip.records import ClientReport, Cohort, TrainRequest

    reports = tuple(
        ClientReport(c, 1, 0.1, 2, 0.0, rate, 1.5) for c, rate in zip("ab", rates, strict=True)
    )
    cohort = Cohort(reports, {"w": torch.tensor([[0.8], [0.4]], dtype=torch.float64)})
    state = RunState({"w": torch.ones(1, dtype=torch.float64)})
    strategy = create_strategy("qfedavg", Setting(options={"q": 2.0}))
    request = TrainRequest(1, ("a", "b"), state.shared)

    def train(asked):
        assert asked.start_loss
        return Updates(asked, [cohort])

    after = strategy.round(state, request, train)
    assert after.shared["w"].item() == pytest.approx(expected, rel=1e-12)


def test_qfedavg_of_q_0_is_the_unweighted_mean():
    results, engine = rounds("qfedavg", setting={"options": {"q": 0.0}})
    for name, tensor in results[0].state.shared.items():
        mean = sum(engine.sent[1, c][name] for c in SIZES) / len(SIZES)
        torch.testing.assert_close(tensor, mean, **TIGHT)


def test_qfedavg_stays_where_nobody_took_a_step(monkeypatch):
    monkeypatch.setattr("tests.support.strategies.RATE_SUM", 0.0)
    results, engine = rounds("qfedavg")
    assert all(torch.equal(results[0].state.shared[n], t) for n, t in start().items())
    assert engine.requests


# --- clients of different ranks ---

RANKS = {"a": 1, "b": 3, "c": 2}


def test_a_client_has_no_more_rows_than_the_layer():
    """Ranks above a layer's own are that layer's, as `scaled_for_rank` has it."""
    ranks = {"a": 1, "b": RANK + 5, "c": 2}
    for strategy in ("flora", "flexlora"):
        asked = rounds(strategy, count=2, setting={"ranks": ranks})
        plain = rounds(strategy, count=2, setting={"ranks": ranks | {"b": RANK}})
        for ours, theirs in zip(asked[0], plain[0], strict=True):
            assert (ours.bytes_up, ours.bytes_down) == (theirs.bytes_up, theirs.bytes_down)
            for name, tensor in theirs.state.flat().items():
                assert torch.equal(ours.state.flat()[name], tensor)


@pytest.mark.parametrize("rslora", [False, True])
def test_flora_and_flexlora_mix_ranks_each_at_its_scaling(rslora):
    power = 0.5 if rslora else 1.0
    scalings = {c: SCALING * (RANK / r) ** power for c, r in RANKS.items()}
    kw = {"setting": {"ranks": RANKS, "rslora": rslora}}
    stacked, engine = rounds("flora", **kw)
    for layer in SIDES:
        expected = exact_mean(engine, layer, scalings=scalings)
        torch.testing.assert_close(model_update(stacked[0].state, layer), expected, **TIGHT)
        assert stacked[0].state.news[names(layer)[0]].shape[0] == sum(RANKS.values())
    flexed, engine = rounds("flexlora", **kw)
    for layer in SIDES:
        u, s, vh = torch.linalg.svd(exact_mean(engine, layer, scalings=scalings))
        expected = u[:, :RANK] * s[:RANK] @ vh[:RANK]
        torch.testing.assert_close(model_update(flexed[0].state, layer), expected, **TIGHT)


def test_a_client_of_lower_rank_starts_from_the_leading_part_of_the_state():
    _, engine = rounds("flexlora", count=2, setting={"ranks": RANKS})
    request = engine.requests[1]
    for layer in SIDES:
        a, b = names(layer)
        whole = SCALING * request.state[b] @ request.state[a]
        u, s, vh = torch.linalg.svd(whole)
        for client, rank in RANKS.items():
            own = request.start(client)
            scaling = SCALING * RANK / rank
            product = scaling * own[b][:, :rank] @ own[a][:rank]
            torch.testing.assert_close(product, u[:, :rank] * s[:rank] @ vh[:rank], **TIGHT)


def test_hetlora_weighs_by_the_norm_of_the_whole_update():
    kw = {"setting": {"ranks": RANKS, "options": {"order_rows": 0.0}}}
    results, engine = rounds("hetlora", **kw)
    squares = {}
    for client, rank in RANKS.items():
        sent = engine.sent[1, client]
        scaling = SCALING * RANK / rank
        squares[client] = sum(
            (scaling * sent[names(n)[1]] @ sent[names(n)[0]]).square().sum() for n in SIDES
        )
    roots = {c: s.sqrt() for c, s in squares.items()}
    for layer in SIDES:
        a, _ = names(layer)
        total = sum(roots.values())
        expected = sum(roots[c] / total * engine.sent[1, c][a] for c in SIZES)
        torch.testing.assert_close(results[0].state.shared[a], expected, **TIGHT)


def test_owners_average_is_not_diluted_by_those_who_lack_the_row():
    kw = {"setting": {"ranks": RANKS, "options": {"average_owners": 1.0, "order_rows": 0.0}}}
    results, engine = rounds("hetlora", **kw)
    a, _ = names(next(iter(SIDES)))
    # Only b holds the third row.
    torch.testing.assert_close(results[0].state.shared[a][2], engine.sent[1, "b"][a][2], **TIGHT)


@pytest.mark.parametrize("owners", [0.0, 1.0])
def test_ordered_rows_keep_the_mean_and_give_lower_ranks_the_best_of_it(owners):
    found = {}
    for ordered in (0.0, 1.0):
        options = {"average_owners": owners, "order_rows": ordered}
        results, _ = rounds("hetlora", setting={"ranks": RANKS, "options": options})
        found[ordered] = results[0].state.shared
    for layer in SIDES:
        a, b = names(layer)
        product = found[0.0][b] @ found[0.0][a]
        torch.testing.assert_close(found[1.0][b] @ found[1.0][a], product, **TIGHT)
        u, s, vh = torch.linalg.svd(product)
        for rank in range(1, RANK):
            best = u[:, :rank] * s[:rank] @ vh[:rank]
            cut = found[1.0][b][:, :rank] @ found[1.0][a][:rank]
            torch.testing.assert_close(cut, best, **TIGHT)


def test_rows_stay_where_every_client_has_all_of_them():
    found = []
    for ordered in (0.0, 1.0):
        ranks = dict.fromkeys(SIZES, RANK)
        results, _ = rounds("hetlora", setting={"ranks": ranks, "options": {"order_rows": ordered}})
        found.append(results[-1].state.shared)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_flexlora_among_owners_is_the_product_of_rows_weighed_by_those_who_hold_them():
    kw = {"setting": {"ranks": RANKS, "options": {"average_owners": 1.0}}}
    results, engine = rounds("flexlora", **kw)
    layer = next(iter(SIDES))
    a, b = names(layer)
    expected = 0
    for row in range(RANK):
        owners = [client for client in SIZES if RANKS[client] > row]
        for client in owners:
            share = SIZES[client] / sum(SIZES[owner] for owner in owners)
            scaling = SCALING * RANK / RANKS[client]
            sent = engine.sent[1, client]
            expected += share * scaling * torch.outer(sent[b][:, row], sent[a][row])
    u, s, vh = torch.linalg.svd(expected)
    best = u[:, :RANK] * s[:RANK] @ vh[:RANK]
    shared = results[0].state.shared
    torch.testing.assert_close(SCALING * shared[b] @ shared[a], best, **TIGHT)


@pytest.mark.parametrize(
    "strategy", sorted(set(STRATEGIES) - {"flora", "flexlora", "hetlora", "local"})
)
def test_other_strategies_refuse_ranks_that_differ(strategy):
    with pytest.raises(UsageError, match=r"different ranks.*flexlora, hetlora or flora"):
        create_strategy(strategy, setting(ranks=RANKS))


# --- what travels ---


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_bytes_are_those_of_the_formula(strategy):
    layers = [Layer(*sides) for sides in SIDES.values()]
    results, _ = rounds(strategy, count=2, state=start(dtype=torch.float32))
    for result in results:
        expected = bytes_per_round(
            strategy, layers, RANK, len(SIZES), server_round=result.server_round
        )
        if strategy == "fed_sb" and result.server_round == 1:
            expected = bytes_per_round("fedit", layers, RANK, len(SIZES))
        assert result.bytes_up == len(SIZES) * expected.up
        assert result.bytes_down == len(SIZES) * expected.down


def test_clients_of_lower_rank_send_and_receive_less():
    results, _ = rounds("flexlora", state=start(dtype=torch.float32), setting={"ranks": RANKS})
    per_rank = 4 * sum(inner + outer for inner, outer in SIDES.values())
    assert results[0].bytes_up == results[0].bytes_down == per_rank * sum(RANKS.values())


# --- what else holds for all ---


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"qfedavg", "centralised"}))
def test_a_head_is_averaged_and_a_state_survives_being_written_down(strategy):
    whole, engine = rounds(strategy, count=4, state=start(head=True))
    if not create_strategy(strategy, setting()).personal:
        expected = client_mean(engine, "head.weight", 4)
        if strategy == "hetlora":  # by norms, not by examples
            assert whole[-1].state.shared["head.weight"].shape == expected.shape
        else:
            found = whole[-1].state.shared["head.weight"]
            torch.testing.assert_close(found, expected, **TIGHT)
    written = RunState.from_flat(whole[1].state.flat())
    tail, _ = rounds(strategy, count=2, total=4, state=written, finished_rounds=2)
    for one, other in pairwise([whole[-1].state.flat(), tail[-1].state.flat()]):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"hetlora", "local", "qfedavg"}))
def test_scaling_the_weights_changes_nothing(strategy, monkeypatch):
    before, _ = rounds(strategy)
    monkeypatch.setattr("tests.support.strategies.SIZES", {c: 10 * n for c, n in SIZES.items()})
    engine = DrawingEngine()
    after, _ = rounds(strategy, engine=engine)
    for layer in SIDES:
        torch.testing.assert_close(
            model_update(before[0].state, layer), model_update(after[0].state, layer), **TIGHT
        )


def test_one_client_is_that_client_under_every_exact_strategy(monkeypatch):
    monkeypatch.setattr("tests.support.strategies.SIZES", {"a": 30})
    for strategy in [*EXACT, "fedit", "flexlora", "lora_fair", "hetlora"]:
        results, engine = rounds(strategy)
        for layer in SIDES:
            a, b = names(layer)
            own = {**engine.requests[0].state, **engine.sent[1, "a"]}
            expected = SCALING * own[b] @ own[a]
            torch.testing.assert_close(
                model_update(results[0].state, layer), expected, rtol=1e-10, atol=1e-12
            )


def test_a_layer_smaller_than_the_rank_is_named():
    wide = {n: t for n, t in start(rank=8).items() if "fc1" in n}
    with pytest.raises(UsageError, match=r"fedsvd at vision_model.*rank 8"):
        rounds("fedsvd", state=wide)
    with pytest.raises(UsageError, match=r"fed_sb at vision_model.*cannot give rank 8"):
        rounds("fed_sb", state=wide)


def test_a_strategy_of_ones_own_is_a_class_in_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from fedclip.federated.strategies import FedAvg\n"
        "class Mine(FedAvg):\n    '''Own.'''\nnumber = 3\n"
    )
    assert type(create_strategy(f"{file}:Mine")).__name__ == "Mine"
    for wrong, words in {
        f"{tmp_path}/none.py:Mine": "there is no file",
        f"{file}:Other": "no class Other",
        f"{file}:number": "no class number",
    }.items():
        with pytest.raises(UsageError, match=words):
            create_strategy(wrong)
    file.write_text("import nothing_of_that_name\n")
    with pytest.raises(UsageError, match="cannot be loaded: ModuleNotFoundError"):
        create_strategy(f"{file}:Mine")


def test_private_tensors_that_are_no_model_tensors_stay_out_of_the_model():
    state = replace(RunState(start()), private={"a": {"control/x": torch.zeros(1)}})
    assert state.of("a").keys() == start().keys()
