"""`data.test_seed`: one test set for runs of all seeds, which none of them trains on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedclip.config import DataConfig
from fedclip.data.loading import load_federated
from fedclip.data.source import ArrayImages, ImageSource
from fedclip.data.sources.site import site_source
from fedclip.errors import UsageError
from fedclip.evaluation.per_client import measured
from tests.data.test_splits import SITES, roles, toy, write_site
from tests.support.data import all_unique, everything, load, to_pixels

SEEDS = range(4)


def parts(**config) -> list[dict[str, set]]:
    """Places of the images of each role over all clients, by seed."""
    found = []
    for seed in SEEDS:
        data = load(seed=seed, test_seed=7, **config)
        assert all_unique(*(everything(client) for client in data.clients))
        one = {
            role: {data.places[i] for client in data.clients for i in getattr(client, role)}
            for role in ("train", "validation", "test")
        }
        own = one["test"]
        one["test"] = {data.places[i] for i in data.test}
        assert own <= one["test"]  # a partition may leave out an image
        found.append(one)
    return found


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shard"])
@pytest.mark.parametrize("limit", [None, 300])
def test_seeds_share_the_test_set_and_never_train_on_it(partition, limit):
    found = parts(
        name="digits", num_clients=5, partition={"name": partition}, max_train_examples=limit
    )
    tests = found[0]["test"]
    assert abs(len(tests) - 0.2 * 1797) < 1
    assert all(one["test"] == tests for one in found)
    for one in found:
        assert not tests & (one["train"] | one["validation"])
        assert len(one["validation"]) / len(one["train"]) == pytest.approx(1 / 7, abs=0.03)
        if limit:
            assert len(one["train"]) == pytest.approx(limit, abs=10)
    assert len({frozenset(one["validation"]) for one in found}) == len(SEEDS)  # redrawn


def test_without_it_the_test_set_is_another_for_each_seed():
    tests = [frozenset(load(seed=s, name="digits", num_clients=5).test) for s in SEEDS]
    assert len(set(tests)) == len(SEEDS)


def test_each_site_tests_on_its_own_share():
    for seed in SEEDS:
        data = load_federated(
            DataConfig(test_seed=1), 0, seed, to_pixels, "key", source=toy(6, 20, 5)
        )
        assert [len(client.test) for client in data.clients] == [20] * 6  # 0.2 of 100 each
        assert data.partition_record()["test_seed"] == 1


@pytest.mark.filterwarnings("ignore:.*(no training|one class):fedclip.errors.FedclipWarning")
@pytest.mark.parametrize("seed", range(3))
def test_a_deployed_site_holds_the_same_images_in_each_role(tmp_path: Path, seed: int):
    for number, (site, classes) in enumerate(SITES.items()):
        write_site(tmp_path, site, classes, number)
    together = load(seed=seed, name="imagefolder", path=str(tmp_path), test_seed=3)
    for client in together.clients:
        path = tmp_path / client.client_id
        own = site_source(str(path), client.client_id, ("emu", "dog", "cat"), {})
        config = DataConfig(name="imagefolder", partition={"name": "natural"}, test_seed=3)
        alone = load_federated(config, 1, seed, to_pixels, "key", source=own, needs_tests=False)
        assert roles(path, alone, alone.clients[0]) == roles(tmp_path, together, client)


def test_copies_of_a_picture_with_captions_are_tested_together(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 4, 4), dtype=np.uint8)
    source = ImageSource(
        name="pairs",
        images=ArrayImages(np.repeat(pixels, 2, axis=0), "pairs"),
        labels=np.arange(60),
        class_names=tuple(f"caption {i}" for i in range(60)),
        templates=("{}",),
        captioned=True,
    )
    tests = []
    for seed in SEEDS:
        data = load_federated(
            DataConfig(test_seed=0, partition={"name": "iid"}), 2, seed, to_pixels, "key",
            captions=True, source=source,
        )  # fmt: skip
        assert data.pictures is not None
        assert set(np.bincount(data.pictures[data.test])) <= {0, 2}
        tests.append(data.test.tolist())
    assert len(tests[0]) == 12
    assert all(one == tests[0] for one in tests)


def test_few_shots_share_a_test_set_too():
    runs = [load(seed=s, name="digits", num_clients=2, shots=4, test_seed=0) for s in SEEDS]
    assert len({frozenset(data.places[i] for i in data.test) for data in runs}) == 1


def test_a_limit_of_the_evaluation_draws_the_same_images():
    drawn = []
    for seed in SEEDS:
        data = load(seed=seed, name="digits", num_clients=5, test_seed=7)
        drawn.append([data.places[i] for i in measured(data, 50, seed)[0]])
    assert len(drawn[0]) == 50
    assert all(one == drawn[0] for one in drawn)


def test_a_client_of_test_images_alone_is_refused_by_name():
    data = DataConfig(
        test_seed=0, test_fraction=0.9, validation_fraction=0, partition={"name": "iid"}
    )
    source = toy(1, 2, 10)
    with pytest.raises(UsageError, match=r"data.test_seed: all images of client-\d"):
        load_federated(data, 10, 0, to_pixels, "key", source=source)
