"""From a configuration to clients: splits, sites, caps, records, and every refusal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from fedclip.config import DataConfig
from fedclip.data.loading import load_federated
from fedclip.errors import UsageError
from tests.support.data import SIZE, all_unique, everything, load


@pytest.fixture(scope="module")
def digits():
    return load(name="digits", partition={"alpha": 0.3})


def test_digits_go_to_ten_clients_whole(digits):
    assert [client.client_id for client in digits.clients] == [f"client-{i:02}" for i in range(10)]
    assert sorted(np.concatenate([everything(c) for c in digits.clients])) == list(range(1797))
    assert digits.pixels.shape == (1797, 3, SIZE, SIZE)
    assert digits.pixels.dtype == np.uint8
    sizes = [(len(c.train), len(c.validation), len(c.test)) for c in digits.clients]
    for train, validation, test in sizes:
        total = train + validation + test
        assert abs(validation - 0.1 * total) <= 1
        assert abs(test - 0.2 * total) <= 1


def test_central_sets_are_the_clients_unions(digits):
    for part in ("validation", "test"):
        union = np.sort(np.concatenate([getattr(c, part) for c in digits.clients]))
        np.testing.assert_array_equal(getattr(digits, part), union)


def test_table_and_record_count_the_same(digits):
    table = np.array(digits.table())
    assert table.shape == (10, 10)
    assert table.sum(axis=0).tolist() == np.bincount(digits.labels).tolist()
    record = digits.partition_record()
    assert json.loads(json.dumps(record)) == record
    for row, client, recorded in zip(
        digits.table("train"), digits.clients, record["clients"], strict=True
    ):
        assert recorded["client_id"] == client.client_id
        assert recorded["train"]["by_class"] == row
        assert recorded["train"]["num_examples"] == len(client.train)
    assert record["partition"]["name"] == "dirichlet"
    assert record["partition"]["alpha"] == 0.3
    assert record["test"]["num_examples"] == len(digits.test)


def test_another_process_gives_the_same_and_calls_nobody(digits):
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.support.data import load\n"
        "print(json.dumps(load(name='digits', partition={'alpha': 0.3}).partition_record()))\n"
        "load(name='digits', partition={'name': 'shard'})\n"
        "from flwr_datasets.common import telemetry\n"
        "print(telemetry.FLWR_TELEMETRY_ENABLED, telemetry.state['executor'])\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    environment.pop("FLWR_TELEMETRY_ENABLED", None)  # set by the partitions of this process
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parents[2])],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    record, telemetry = done.stdout.splitlines()
    assert json.loads(record) == digits.partition_record()
    assert telemetry == "0 None"
    assert done.stderr == ""


def test_another_seed_gives_another_partition(digits):
    other = load(name="digits", seed=1, partition={"alpha": 0.3})
    assert other.fingerprint == digits.fingerprint
    assert other.partition_record() != digits.partition_record()


def test_the_cap_is_stratified_and_spares_decoding(monkeypatch):
    from fedclip.data.source import ArrayImages

    opened = []
    original = ArrayImages.open

    def counted(self, index):
        opened.append(index)
        return original(self, index)

    monkeypatch.setattr(ArrayImages, "open", counted)
    data = load(name="digits", num_clients=2, max_train_examples=140)
    assert sum(len(client.train) for client in data.clients) in (139, 140, 141)
    # 140 and the 0.1 + 0.2 that clients hold out; sizes are read before images are decoded.
    assert len(set(opened)) == len(data.labels) == 200
    assert set(np.bincount(data.labels).tolist()) <= {19, 20, 21}


def test_icons_have_their_families_as_sites():
    data = load(name="icons")
    ids = [client.client_id for client in data.clients]
    assert len(ids) >= 24
    assert len(data.test) >= 1500
    np.testing.assert_array_equal(
        data.test, np.sort(np.concatenate([client.test for client in data.clients]))
    )
    trained = np.concatenate([client.train for client in data.clients])
    assert all_unique(trained, data.validation, data.test)
    assert data.partition == {"name": "natural", "seed": data.partition["seed"]}
    assert 0.08 < len(data.validation) / (len(trained) + len(data.validation)) < 0.12


def test_icons_without_their_sites_hold_out_their_own_tests():
    data = load(name="icons", num_clients=3, partition={"name": "iid"})
    assert [client.client_id for client in data.clients] == ["client-00", "client-01", "client-02"]
    assert all(len(client.test) and all_unique(client.test, data.test) for client in data.clients)


def test_classes_that_no_client_was_given(recwarn):
    warnings.simplefilter("always")
    load(name="digits", num_clients=2, partition={"name": "pathological"})
    assert any("classes have no training image" in str(w.message) for w in recwarn)


def test_sites_are_asked_for_before_anything_is_decoded():
    with pytest.raises(UsageError, match=r"data\.partition\.name: natural needs .* with sites"):
        load_federated(DataConfig(name="digits", partition={"name": "natural"}), 2, 0, None, "key")


def test_fractions_that_leave_nothing():
    with pytest.raises(UsageError, match=r"validation_fraction and data\.test_fraction must leave"):
        load(name="digits", validation_fraction=0.5, test_fraction=0.5)


def test_beyond_the_memory_limit_the_pixels_are_mapped(tmp_path, monkeypatch, digits):
    monkeypatch.setenv("FEDCLIP_CACHE", str(tmp_path))
    data = load(name="digits", memory_gb=0, partition={"alpha": 0.3})
    assert isinstance(data.pixels, np.memmap)
    np.testing.assert_array_equal(data.pixels, digits.pixels)
    assert data.partition_record() == digits.partition_record()
