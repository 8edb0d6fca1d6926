"""Each client's rank: dealt, named, by shares, or as its memory allows; and their configuration."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclip.config.loading import config_from_dict, dump_config, load_config
from fedclip.errors import UsageError
from fedclip.federated.client_ranks import client_ranks, rank_for_memory, ranks_for_memory
from fedclip.federated.traffic import Layer

IDS = [f"client-{number}" for number in range(9)]


def counts(spec: Any, clients: int, seed: int = 0) -> dict[int, int]:
    ids = [f"client-{number}" for number in range(clients)]
    return dict(sorted(Counter(client_ranks(spec, ids, seed).values()).items()))


def test_a_list_is_dealt_out_evenly() -> None:
    assert counts([4, 8, 16], 9) == {4: 3, 8: 3, 16: 3}
    assert counts([4, 8, 16], 8) == {4: 3, 8: 3, 16: 2}
    assert counts([16, 4], 3) == {4: 1, 16: 2}
    assert counts([8], 3) == {8: 3}


def test_who_gets_which_rank_follows_from_the_seed_alone() -> None:
    found = client_ranks([4, 8, 16], IDS, seed=3)
    assert list(found) == IDS
    assert client_ranks((4, 8, 16), IDS[::-1], seed=3) == found
    drawn = [tuple(client_ranks([4, 8, 16], IDS, seed).values()) for seed in range(5)]
    assert len(set(drawn)) == 5
    assert (4, 8, 16) * 3 not in drawn


def test_shares_by_largest_remainder() -> None:
    assert counts({"4": 0.5, "8": 0.3, "16": 0.2}, 10) == {4: 5, 8: 3, 16: 2}
    # 3.5, 2.1 and 1.4 of 7: the one that is left goes to rank 4.
    assert counts({"16": 0.2, "4": 0.5, "8": 0.3}, 7) == {4: 4, 8: 2, 16: 1}
    assert counts({4: 0.29, 8: 0.71}, 100) == {4: 29, 8: 71}  # 0.29 * 100 is 28.999...
    assert counts({"8": 0.333333, "4": 0.333333, "2": 0.333334}, 4) == {2: 2, 4: 1, 8: 1}
    assert counts({"8": 0.5, "4": 0.5}, 3) == {4: 2, 8: 1}  # of equal remainders the lower rank
    assert counts({"4": 0.02, "8": 0.14, "16": 0.84}, 25) == {4: 1, 8: 3, 16: 21}  # 0.5, 3.5000...4


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.integers(1, 64), st.integers(1, 9), min_size=1), st.integers(1, 60))
def test_counts_are_within_one_of_the_shares(parts: dict[int, int], clients: int) -> None:
    total = sum(parts.values())
    found = counts({rank: part / total for rank, part in parts.items()}, clients)
    assert sum(found.values()) == clients
    for rank, part in parts.items():
        assert abs(found.get(rank, 0) - part / total * clients) < 1


def test_ranks_by_name() -> None:
    assert client_ranks({"b": 8, "a": 2}, ["b", "a"], 0) == {"a": 2, "b": 8}
    assert client_ranks({"b": 8, "default": 4}, ["a", "b", "c"], 0) == {"a": 4, "b": 8, "c": 4}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "at least one rank"),
        ([0], "rank of a must be a whole number from 1 to 64, got 0"),
        ([65], "got 65"),
        ({"a": 4}, "must name every client or have a default: add b$"),
        ({"a": 4, "b": 4, "bb": 8}, "names bb, but the clients are a, b;"),
        ({"a": 0, "b": 4}, "rank of a must be"),
        ({"4": 0.5, "8": 0.4}, "must sum to 1, got 0.9"),
        ({"0": 0.5, "8": 0.5}, "ranks from 1 to 64, got '0'"),
        ({"08": 0.5, "8": 0.5}, "ranks from 1 to 64, got '08'"),
        ({"4": -0.5, "8": 1.5}, "share of rank 4 must be above 0"),
    ],
)
def test_what_gives_no_ranks(spec: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        client_ranks(spec, ["a", "b"], 0)
    assert str(error.value).startswith("federation.client_ranks")


def test_many_missing_clients_are_not_all_listed() -> None:
    with pytest.raises(UsageError, match=r"add client-1, client-2, client-3 and 5 more$"):
        client_ranks({"client-0": 4}, IDS, 0)


def test_the_largest_rank_that_fits() -> None:
    # 16 bytes * (300 + 200) = 8000 a rank and layer.
    cost: dict[str, Any] = {
        "layers": [Layer(300, 200)] * 5,
        "base_bytes": 1_000_000,
        "activation_bytes": 500_000,
    }
    assert rank_for_memory(1.54, **cost) == 1
    assert rank_for_memory(1.66, **cost) == 4
    assert rank_for_memory(1.659, **cost) == 3
    assert rank_for_memory(100, **cost) == 64
    assert rank_for_memory(100, maximum=8, **cost) == 8
    with pytest.raises(UsageError) as error:
        rank_for_memory(1.539, who="client-3", **cost)
    assert str(error.value) == (
        "federation.client_memory_mb: client-3 has 1.539 MB, but training takes 1.0 MB for the "
        "base model, 0.5 MB for activations and 0.040 MB for each rank; give it at least 2 MB, or "
        "lower data.batch_size"
    )
    spec = {"b": 1.66, "default": 1.54}
    assert ranks_for_memory(spec, ["c", "b"], **cost) == {"b": 4, "c": 1}
    with pytest.raises(UsageError, match=r"federation\.client_memory_mb names d"):
        ranks_for_memory({"d": 5.0, "default": 5.0}, ["c"], **cost)
    with pytest.raises(UsageError, match=r"federation\.client_memory_mb: c has 1 MB"):
        ranks_for_memory({"c": 1.0}, ["c"], **cost)


def federation(**keys: Any) -> dict[str, Any]:
    return {"federation": {"strategy": "flexlora", **keys}}  # goes with every kind of ranks


@pytest.mark.parametrize(
    "spec",
    [[4, 8, 16], {"client-0": 4, "default": 8}, {"4": 0.5, "8": 0.5}, {"8": 1.0}, {"8": 1}],
)
def test_a_configuration_keeps_its_kind_of_ranks(spec: Any, tmp_path: Any) -> None:
    config = config_from_dict(federation(client_ranks=spec))
    found = config.federation.client_ranks
    assert found == (tuple(spec) if isinstance(spec, list) else spec)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    again = load_config(path)
    assert again == config
    assert repr(again.federation.client_ranks) == repr(found)  # 1 and 1.0 mean different things


def test_ranks_as_keys_may_be_numbers() -> None:
    config = config_from_dict(federation(client_ranks={4: 0.5, 8: 0.5}))
    assert config.federation.client_ranks == {"4": 0.5, "8": 0.5}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"client_ranks": []}, r"^federation\.client_ranks must be a list of ranks, a mapping"),
        ({"client_ranks": {}}, r"^federation\.client_ranks must be a list of ranks, a mapping"),
        ({"client_ranks": 8}, r"^federation\.client_ranks must be .*, got 8 \("),
        ({"client_ranks": [8, 65]}, r"^federation\.client_ranks\[1\] must be .*, got 65 \("),
        ({"client_ranks": {"a": 0}}, r"^federation\.client_ranks must be"),
        (
            {"client_ranks": {"4": 0.5, "8": 0.4}},
            r"^federation\.client_ranks: .* sum to 1, got 0.9",
        ),
        ({"client_ranks": {"a": 0.5, "8": 0.5}}, r"^federation\.client_ranks: .* got 'a'"),
        ({"client_memory_mb": {"a": 0}}, r"^federation\.client_memory_mb must be a mapping of"),
        ({"client_memory_mb": 500}, r"^federation\.client_memory_mb must be a mapping of"),
        ({"dynamic_ranks": {"energy": 1.5}}, r"^federation\.dynamic_ranks\.energy must be"),
        ({"dynamic_ranks": {"tau": 0.9}}, r"^unknown key federation\.dynamic_ranks\.tau"),
        ({"dynamic_ranks": {"warmup": 0.5, "cooldown": 0.5}}, r"leave no round in which ranks"),
    ],
)
def test_what_a_configuration_may_not_say(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        config_from_dict(federation(**keys))
    assert "\n" not in str(error.value)


def test_ranks_have_one_source() -> None:
    dynamic = {"dynamic_ranks": {"enabled": True}}
    ranks, memory = {"client_ranks": [4, 8]}, {"client_memory_mb": {"default": 500}}
    for alone in (dynamic, ranks, memory, {**ranks, "dynamic_ranks": {"enabled": False}}):
        config_from_dict(federation(**alone))
    for both in ({**dynamic, **ranks}, {**dynamic, **memory}, {**ranks, **memory}):
        with pytest.raises(UsageError, match="cannot be used together") as error:
            config_from_dict(federation(**both))
        assert all(f"federation.{key}" in str(error.value) for key in both)
    for alone in (dynamic, ranks, memory):
        with pytest.raises(UsageError, match=r"needs an adapter, but model\.lora\.enabled"):
            config_from_dict({"model": {"lora": {"enabled": False}}, **federation(**alone)})


def test_the_least_rank_must_be_within_the_budget() -> None:
    plan = {"enabled": True, "minimum": 5, "budget": 0.6}
    with pytest.raises(UsageError, match=r"minimum \(5\) exceeds .* 0.6 of model.lora.r \(8\)"):
        config_from_dict(federation(dynamic_ranks=plan))
    config_from_dict(federation(dynamic_ranks={**plan, "minimum": 4}))
    config_from_dict(federation(dynamic_ranks={**plan, "enabled": False}))
