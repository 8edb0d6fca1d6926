"""Groups of clients with adapters of their own: by task, shared in part, or found."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclip.federated.rounds import run_rounds
from fedclip.federated.strategies import create_strategy
from fedclip.federated.strategies.groups import (
    Clustered,
    Grouped,
    SharedAndTask,
    cluster,
    similarities,
    with_common_ranks,
)
from fedclip.records import ClientReport, Cohort, RunState
from tests.support.strategies import (
    SCALING,
    SIDES,
    SIZES,
    DrawingEngine,
    names,
    rounds,
    setting,
    start,
)

MEMBERS = {"a": "north", "b": "south", "c": "north"}
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("name", ["fedit", "flexlora", "fedex", "flora"])
def test_a_group_is_a_federation_of_its_members_alone(name):
    """Every group ends as if it had gone through the rounds by itself."""
    together, _ = rounds(Grouped(create_strategy(name, setting()), MEMBERS), count=2, total=2)
    for group in ("north", "south"):
        sizes = {c: SIZES[c] for c in SIZES if MEMBERS[c] == group}
        alone = run_rounds(
            RunState(start()),
            DrawingEngine(),
            create_strategy(name, setting()),
            clients=sizes,
            rounds=2,
            clients_per_round=len(sizes),
            seed=3,
        )
        for ours, theirs in zip(together, alone, strict=True):
            expected, found = theirs.state.flat(), ours.state.groups[group].flat()
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                assert torch.equal(found[key], tensor), key


def test_reports_and_bytes_are_those_of_all_groups():
    plain, _ = rounds("fedit", state=start(dtype=torch.float32))
    grouped, _ = rounds(
        Grouped(create_strategy("fedit", setting()), MEMBERS), state=start(dtype=torch.float32)
    )
    assert {r.client_id for r in grouped[0].reports} == set(SIZES)
    assert grouped[0].bytes_up == plain[0].bytes_up
    assert grouped[0].bytes_down == plain[0].bytes_down


def test_a_group_without_drawn_clients_stays_as_it_is():
    strategy = Grouped(create_strategy("fedit", setting()), MEMBERS)
    loop = run_rounds(
        RunState(start()),
        DrawingEngine(),
        strategy,
        clients=SIZES,
        rounds=6,
        clients_per_round=1,
        seed=3,
    )
    before = RunState(start())
    seen = set()
    for result in loop:
        (report,) = result.reports
        moved = MEMBERS[report.client_id]
        seen.add(moved)
        for group, state in result.state.groups.items():
            same = all(
                torch.equal(t, before.groups.get(group, before).shared[n])
                for n, t in state.shared.items()
            )
            assert same == (group != moved)
        before = result.state
    assert seen == {"north", "south"}


def test_common_ranks_by_hand():
    """One layer, rank 2, of which one rank is shared; groups weigh 3 and 1."""
    a, b = "base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"
    north = RunState({a: torch.tensor([[1.0, 2], [3, 4]]), b: torch.tensor([[1.0, 2], [3, 4]])})
    south = RunState({a: torch.tensor([[5.0, 6], [7, 8]]), b: torch.tensor([[5.0, 6], [7, 8]])})
    found = with_common_ranks({"n": north, "s": south}, {"n": 3, "s": 1}, 1)
    # Row 0 of A: (3 * 1 + 5) / 4 = 2, (3 * 2 + 6) / 4 = 3; column 0 of B: 2, (9 + 7) / 4 = 4.
    assert found["n"].shared[a].tolist() == [[2, 3], [3, 4]]
    assert found["s"].shared[a].tolist() == [[2, 3], [7, 8]]
    assert found["n"].shared[b].tolist() == [[2, 2], [4, 4]]
    assert found["s"].shared[b].tolist() == [[2, 6], [4, 8]]
    assert north.shared[a].tolist() == [[1, 2], [3, 4]]  # what was given is not changed


def test_shared_ranks_are_fedit_of_all_and_the_rest_fedit_of_the_group():
    strategy = SharedAndTask(create_strategy("fedit", setting()), MEMBERS, shared_rank=2)
    found, _ = rounds(strategy)
    everyone, _ = rounds("fedit")
    alone, _ = rounds(Grouped(create_strategy("fedit", setting()), MEMBERS))
    for layer in SIDES:
        a, b = names(layer)
        for group, state in found[0].state.groups.items():
            ours, own = state.shared, alone[0].state.groups[group].shared
            all_ = everyone[0].state.shared
            torch.testing.assert_close(ours[a][:2], all_[a][:2], **TIGHT)
            torch.testing.assert_close(ours[b][:, :2], all_[b][:, :2], **TIGHT)
            assert torch.equal(ours[a][2:], own[a][2:])
            assert torch.equal(ours[b][:, 2:], own[b][:, 2:])


def test_similarities_are_cosines_of_what_was_added_to_the_products():
    engine = DrawingEngine()
    state = {n: t + 0.1 for n, t in start().items()}
    rounds("fedit", state=state, engine=engine)
    sent = [engine.sent[1, c] for c in SIZES]
    reports = tuple(ClientReport(c, n, 0.1, 1, 0.0) for c, n in SIZES.items())
    cohort = Cohort(reports, {n: torch.stack([u[n] for u in sent]) for n in state})
    found = similarities(setting(), state, cohort)
    dense = []
    for update in sent:
        parts = []
        for layer in SIDES:
            a, b = names(layer)
            parts.append(SCALING * (update[b] @ update[a] - state[b] @ state[a]).flatten())
        dense.append(torch.cat(parts))
    dense = torch.stack([row / row.norm() for row in dense])
    torch.testing.assert_close(found, dense @ dense.T, rtol=1e-9, atol=1e-9)


def test_clusters_by_hand():
    """Two pairs that point the same way, and one client at right angles to all."""
    alike = torch.eye(5, dtype=torch.float64)
    alike[0, 3] = alike[3, 0] = 0.9
    alike[1, 2] = alike[2, 1] = 0.8
    assert cluster(alike, 3) == [0, 1, 1, 0, 2]
    assert cluster(alike, None) == [0, 1, 1, 0, 2]
    assert cluster(torch.ones(2, 2), None) == [0, 0]


@settings(deadline=None)
@given(st.integers(3, 12), st.integers(2, 14), st.integers(0, 99))
def test_clusters_are_numbered_from_the_first_client_on(clients, count, seed):
    rows = torch.from_numpy(np.random.default_rng(seed).normal(size=(clients, 4)))
    rows = rows / rows.norm(dim=1, keepdim=True)
    for asked in (count, None):
        labels = cluster(rows @ rows.T, asked)
        firsts = [labels.index(label) for label in sorted(set(labels))]
        assert firsts == sorted(firsts)
        assert sorted(set(labels)) == list(range(len(set(labels))))
        assert len(set(labels)) <= min(asked or 10, clients)


class TwoWays(DrawingEngine):
    """Clients a and c move one way, b another."""

    def train(self, request):
        for cohort in super().train(request):
            client = cohort.reports[0].client_id
            ways = {"a": 1.0, "b": -1.0, "c": 1.1}
            moved = {n: request.start(client)[n][None] + ways[client] for n in cohort.tensors}
            yield replace(cohort, tensors=moved)


@pytest.mark.parametrize("first", [1, 2])
def test_clustered_rounds(first):
    """All train together, are told apart, and go on apart from what their own group has learnt."""
    strategy = Clustered(create_strategy("fedit", setting()), SIZES, first, clusters=2)
    state = {n: t * 0 + 0.5 for n, t in start().items()}
    found, engine = rounds(strategy, count=3, total=3, state=state, engine=TwoWays())
    assert len(found) == 3
    assert all(not result.state.groups for result in found[: first - 1])
    result = found[first - 1]
    assert result.state.member_of == {"a": "cluster-0", "c": "cluster-0", "b": "cluster-1"}
    assert {r.client_id for r in result.reports} == set(SIZES)
    before = found[first - 2].state.shared if first > 1 else state
    for name, tensor in before.items():
        north = (30 * 1.0 + 20 * 1.1) / 50  # of a and c, by their examples
        groups = result.state.groups
        torch.testing.assert_close(groups["cluster-0"].shared[name], tensor + north, **TIGHT)
        torch.testing.assert_close(groups["cluster-1"].shared[name], tensor - 1, **TIGHT)
    # One training of every client in the round of clustering; then one for each group.
    asked = [request.client_ids for request in engine.requests]
    assert asked[first - 1] == ("a", "c", "b")
    assert asked[first:] == [("a", "c"), ("b",)] * (3 - first)


def test_everyone_takes_part_in_the_round_of_clustering():
    strategy = Clustered(create_strategy("fedit", setting()), SIZES, 1, clusters=2)
    loop = run_rounds(
        RunState({n: t * 0 + 0.5 for n, t in start().items()}),
        TwoWays(),
        strategy,
        clients=SIZES,
        rounds=2,
        clients_per_round=1,
        seed=3,
    )
    assert [len(result.reports) for result in loop] == [3, 1]


NAME = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=8)


@given(st.dictionaries(NAME, NAME, max_size=4), st.lists(NAME, max_size=3, unique=True))
def test_a_state_with_groups_comes_back_from_its_flat_form(member_of, groups):
    inner = {g: RunState({"w": torch.full((2,), float(i))}) for i, g in enumerate(sorted(groups))}
    state = RunState({"w": torch.zeros(2)}, private={"x/y": {"v": torch.ones(1)}}, groups=inner)
    state = replace(state, member_of=member_of)
    back = RunState.from_flat(state.flat())
    assert back.member_of == member_of
    assert list(back.groups) == sorted(groups)
    assert back.flat().keys() == state.flat().keys()
    for name, tensor in state.flat().items():
        assert torch.equal(back.flat()[name], tensor)
    for client_id, group in member_of.items():
        home = back.groups.get(group)
        expected = home.shared["w"] if home else state.shared["w"]
        assert torch.equal(back.of(client_id)["w"], expected)


class Backwards(DrawingEngine):
    """Clients that come in another order than they were asked."""

    def train(self, request):
        yield from reversed(list(super().train(request)))


@pytest.mark.parametrize("strategy", ["flexlora", "fedsa", "local"])
def test_stacked_updates_are_in_the_order_of_the_request(strategy):
    """Whatever order clients come in, as those of several tasks do: the same bytes."""
    (expected,), _ = rounds(strategy)
    (found,), _ = rounds(strategy, engine=Backwards())
    assert [r.client_id for r in found.reports] == [r.client_id for r in expected.reports]
    for name, tensor in expected.state.flat().items():
        assert torch.equal(found.state.flat()[name], tensor)
