"""Partitions against flwr-datasets itself, and what every partition and split must keep."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclip.data.partition import _dirichlet_draw, partition, partition_seed
from fedclip.data.splits import allocate, cap, split
from fedclip.errors import UsageError

LABELS = np.random.default_rng(1).integers(0, 5, 200)


def flwr(name: str, labels, shuffle_seed: int, **options) -> list[list[int]]:
    """What flwr-datasets makes of the same rows, used as its own documentation says."""
    import datasets
    from flwr_datasets import partitioner

    rows = datasets.Dataset.from_dict({"index": range(len(labels)), "label": labels})
    made = getattr(partitioner, name)(**options)
    made.dataset = rows.shuffle(seed=shuffle_seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its retries, and pyarrow's deprecations
        return [sorted(made.load_partition(i)["index"]) for i in range(made.num_partitions)]


BY_LABEL = {"num_partitions": 6, "partition_by": "label"}


@pytest.mark.parametrize(
    ("name", "ours", "theirs", "options"),
    [
        ("iid", {}, "IidPartitioner", {"num_partitions": 6}),
        (
            "dirichlet",
            {"alpha": 0.5, "min_size": 2},
            "DirichletPartitioner",
            BY_LABEL | {"alpha": 0.5, "min_partition_size": 2},
        ),
        (
            "pathological",
            {"classes_per_client": 3},
            "PathologicalPartitioner",
            BY_LABEL
            | {"num_classes_per_partition": 3, "class_assignment_mode": "first-deterministic"},
        ),
        (
            "shard",
            {"shards_per_client": 4},
            "ShardPartitioner",
            BY_LABEL | {"num_shards_per_partition": 4},
        ),
        ("size", {"size_skew": "linear"}, "LinearPartitioner", {"num_partitions": 6}),
        ("size", {"size_skew": "square"}, "SquarePartitioner", {"num_partitions": 6}),
        ("size", {"size_skew": "exponential"}, "ExponentialPartitioner", {"num_partitions": 4}),
    ],
)
def test_the_partition_is_flwr_datasets_own(name, ours, theirs, options):
    seed = partition_seed(3)
    if name in ("dirichlet", "pathological", "shard"):
        options = options | {"seed": seed}
    expected = flwr(theirs, LABELS, seed, **options)
    made = partition(LABELS, name, options["num_partitions"], 3, **ours)
    assert [part.tolist() for part in made] == expected


def test_natural_is_by_site_in_ascending_order():
    sites = np.array([2, 0, 2, 5, 0])
    parts = partition(np.zeros(5, dtype=np.int64), "natural", 99, 0, sites=sites)
    assert [part.tolist() for part in parts] == [[1, 4], [0, 2], [3]]


def test_further_seeds_are_tried_in_order():
    """Alpha 0.1 and 25 examples at least: few first draws do, and none may hang."""
    labels = np.random.default_rng(0).integers(0, 10, 600)
    counts = np.bincount(labels)
    options = BY_LABEL | {"num_partitions": 10, "alpha": 0.1, "min_partition_size": 25}
    retried = 0
    for seed in range(5):
        start = partition_seed(seed)
        found, _ = _dirichlet_draw(counts, 10, start, alpha=0.1, min_partition_size=25)
        expected = flwr("DirichletPartitioner", labels, found, seed=found, **options)
        made = partition(labels, "dirichlet", 10, seed, alpha=0.1, min_size=25)
        assert [part.tolist() for part in made] == expected
        assert min(map(len, made)) >= 25
        if found > start:  # the seed before it fails in flwr-datasets too
            retried += 1
            with pytest.raises(ValueError, match="attempts"):
                flwr("DirichletPartitioner", labels, found - 1, seed=found - 1, **options)
    assert retried > 0


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["iid", "dirichlet", "pathological", "shard", "size"]),
    num_clients=st.integers(1, 8),
    classes=st.integers(2, 6),
    n=st.integers(120, 200),
    seed=st.integers(0, 2**40),
    grouped=st.booleans(),
)
def test_partitions_are_disjoint_and_complete(name, num_clients, classes, n, seed, grouped):
    rng = np.random.default_rng(n)
    labels = rng.integers(0, classes, n)
    groups = rng.integers(0, 60, n) if grouped else None
    parts = partition(labels, name, num_clients, seed, groups=groups, alpha=1.0, min_size=1)
    assert len(parts) == num_clients
    joined = np.concatenate(parts)
    assert len(np.unique(joined)) == len(joined)
    assert all(len(part) for part in parts)
    if name in ("iid", "dirichlet", "size"):
        assert sorted(joined) == list(range(n))
    if name == "shard" and not grouped:
        assert len(joined) > n - 2 * num_clients
    if name == "pathological" and not grouped:
        assert all(len(np.unique(labels[part])) == 2 for part in parts)
    if groups is not None:
        owners = [set(groups[part].tolist()) for part in parts]
        assert sum(map(len, owners)) == len(set().union(*owners))
    again = partition(labels, name, num_clients, seed, groups=groups, alpha=1.0, min_size=1)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))


def test_another_seed_makes_another_partition():
    first, second = (partition(LABELS, "iid", 4, seed) for seed in (0, 1))
    assert not np.array_equal(first[0], second[0])


@pytest.mark.parametrize(
    ("name", "num_clients", "options", "words"),
    [
        ("iid", 201, {}, ["federation.num_clients", "200 training examples", "201 clients"]),
        (
            "dirichlet",
            10,
            {"min_size": 21},
            ["data.partition.min_size", "200", "10 clients 21 each"],
        ),
        (
            "dirichlet",
            10,
            {"min_size": 19, "alpha": 0.1},
            ["data.partition.min_size", "alpha 0.1", "1000 seeds", "raise data.partition.alpha"],
        ),
        (
            "pathological",
            10,
            {"classes_per_client": 6},
            ["data.partition.classes_per_client", "at most the 5 classes", "got 6"],
        ),
        (
            "pathological",
            150,
            {"classes_per_client": 5},
            ["data.partition.classes_per_client", "with 5 a client"],
        ),
        (
            "shard",
            50,
            {"shards_per_client": 5},
            ["data.partition.shards_per_client", "50 clients", "250 training examples"],
        ),
        (
            "size",
            20,
            {"size_skew": "exponential"},
            ["data.partition.size_skew", "exponential", "choose linear"],
        ),
        ("natural", 10, {}, ["data.partition.name: natural needs a data set with sites"]),
        ("fair", 10, {}, ["data.partition.name must be one of iid, dirichlet", "'fair'"]),
    ],
)
def test_impossible_partitions_say_what_to_change(name, num_clients, options, words):
    with pytest.raises(UsageError) as caught:
        partition(LABELS, name, num_clients, 0, **options)
    for word in words:
        assert word in str(caught.value)


def test_flwr_datasets_is_silent_and_calls_nobody(capfd):
    partition(LABELS, "shard", 10, 0)
    partition(LABELS, "pathological", 10, 0, classes_per_client=1)
    out, err = capfd.readouterr()
    assert out == err == ""


def test_allocate_by_hand():
    def shares(sizes, *how):
        return allocate(np.array(sizes), how[0], np.random.default_rng(0), *how[1:]).tolist()

    sizes = [50, 30, 20]
    assert shares(sizes, 10) == [5, 3, 2]
    three, two, one = shares(sizes, 7)  # 3.5, 2.1, 1.4
    assert (three in (3, 4), two in (2, 3), one in (1, 2)) == (True,) * 3
    assert sorted(shares(sizes, 1, 1)) == [0, 0, 1]
    assert shares([100, 1, 0], 10, 1) == [9, 1, 0]
    assert shares([100, 1, 1, 1], 5, 1) == [2, 1, 1, 1]
    assert shares(sizes, 1000) == [50, 30, 20]
    assert shares(sizes, 0) == [0, 0, 0]


def test_cap_keeps_every_site_and_the_classes_proportions():
    labels = np.array([0] * 60 + [1] * 30 + [0] * 2)
    sites = np.array([0] * 90 + [1] * 2)
    kept = cap(labels, sites, 10, seed=0)
    assert len(kept) == 10
    assert np.bincount(sites[kept]).tolist() == [9, 1]
    assert np.bincount(labels[kept][sites[kept] == 0]).tolist() == [6, 3]
    assert cap(labels, None, None, seed=0).tolist() == list(range(92))
    assert cap(labels, None, 500, seed=0).tolist() == list(range(92))


def parts_of(indices, labels, groups=None, validation=0.1, test=0.2, seed=0):
    return split(
        np.asarray(indices),
        np.asarray(labels),
        groups,
        validation_fraction=validation,
        test_fraction=test,
        seed=seed,
    )


def test_split_by_hand():
    labels = np.array([0] * 20 + [1] * 10)
    train, validation, test = parts_of(range(30), labels)
    assert np.bincount(labels[train]).tolist() == [14, 7]
    assert np.bincount(labels[validation]).tolist() == [2, 1]
    assert np.bincount(labels[test]).tolist() == [4, 2]


def test_a_single_example_is_for_training():
    train, validation, test = parts_of([7], np.zeros(8, dtype=int), test=0.6, validation=0.3)
    assert train.tolist() == [7]
    assert not len(validation)
    assert not len(test)


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 80),
    classes=st.integers(1, 5),
    validation=st.floats(0, 0.45),
    test=st.floats(0, 0.45),
    groups=st.none() | st.integers(1, 40),
    seed=st.integers(0, 2**62),
)
def test_splits_are_disjoint_complete_and_keep_groups_together(
    n, classes, validation, test, groups, seed
):
    rng = np.random.default_rng(seed)
    indices = np.sort(rng.permutation(100)[:n])
    labels, drawn = rng.integers(0, classes, 100), None
    if groups is not None:
        drawn = rng.integers(0, groups, 100)
    parts = parts_of(indices, labels, drawn, validation, test, seed)
    assert sorted(np.concatenate(parts)) == indices.tolist()
    assert len(parts[0])
    if drawn is None:
        assert abs(len(parts[2]) - test * n) <= 1
        assert abs(len(parts[1]) - validation * n) <= 1
    else:
        sides = [set(drawn[part].tolist()) for part in parts]
        assert not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]
    again = parts_of(indices, labels, drawn, validation, test, seed)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))


def test_groups_are_held_out_in_about_the_fraction_asked_for():
    """Many small groups in many classes: rounding by class must not eat the whole share."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(50), 6)
    groups = np.arange(300) // 3  # two drawings of three variants in each class
    train, validation, test = parts_of(np.arange(300), labels, groups, seed=int(rng.integers(99)))
    assert [len(train), len(validation), len(test)] == [210, 30, 60]
