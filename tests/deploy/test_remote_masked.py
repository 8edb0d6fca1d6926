"""Masked sums over machines, without the machines: sites are functions in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from fedclip.config.loading import config_from_dict
from fedclip.deploy.coordinator.coordinate import coordinate
from fedclip.deploy.keys import folder as keys
from fedclip.deploy.keys.peers import PEERS, write_peers
from fedclip.deploy.log.verify import verify_folders
from fedclip.deploy.messages.envelope import Envelope, read_header
from fedclip.deploy.messages.replies import MASKED, WORDS
from fedclip.deploy.remote.last_sum import LAST_SUM
from fedclip.errors import TrainingFailed, UsageError
from fedclip.experiment.run import run
from fedclip.models.adapter_folder import read_adapter
from tests.support.machines import (
    MAY_LEAVE,
    FakeMail,
    coordinate_here,
    sequential,
    trainer,
    tree,
    write_images,
)

Site = Callable[[bytes], bytes | None]
SIZES = {"north": 12, "south": 9, "west": 14, "east": 8}
FFA = {"strategy": "ffa", "rounds": 3, "num_clients": 4}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), SIZES)


@pytest.fixture(scope="module")
def key_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "keys"
    keys.init(folder, ["localhost"])
    for name in SIZES:
        keys.site(folder, name)
    write_peers(folder)
    return folder


def site(images: Path, state: Path, key_folder: Path, name: str, **more: Any) -> Site:
    place = str(keys.site_folder(key_folder, name))
    return trainer(images, state, name, **{"keys": place, **more}).answer


def sections(key_folder: Path, **more: Any) -> dict[str, Any]:
    deploy = {"keys": str(key_folder), "round_deadline": 1.0, "join_deadline": 1.0, "attempts": 1}
    whole: dict[str, Any] = {"secure": {"aggregation": "masked"}, "federation": FFA}
    whole["model"] = {"model_name": "random:tiny", "lora": {"r": 2, "last_layers": 1}}
    return {**whole, "deploy": {**deploy, **more}}


def kinds(mail: FakeMail, name: str) -> list[str]:
    """What a site was asked, in order."""
    headers = [read_header(data) for receiver, data in mail.sent if receiver == name]
    return [str(header.get("step", header["kind"])) for header in headers]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_masked_run_is_the_plain_one_and_shows_nothing_else(
    images: Path, key_folder: Path, tmp_path: Path
) -> None:
    given = sections(key_folder)
    plain = run(
        sequential(images, **{k: v for k, v in given.items() if k != "secure"}),
        output=tmp_path / "alone",
    )
    mail = FakeMail({name: site(images, tmp_path, key_folder, name) for name in SIZES})
    done, said = coordinate_here(config_from_dict(tree(images, **given)), tmp_path / "run", mail)
    (ours, _, _), (theirs, _, _) = map(read_adapter, (done.adapter, plain.adapter))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)
    for own, other in zip(metrics(done.folder)[1:], metrics(plain.folder)[1:], strict=True):
        assert own["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert own["num_examples"] == other["num_examples"]
    # Four trips in the first round, two in each other one.
    trips = ["hello", "keys", "shares", "train", "open", *["train", "open"] * 2, "result"]
    assert kinds(mail, "north") == trips
    assert any("of the 4 clients of a round, 3 must stay" in line for line in said)
    for _, data in mail.received:
        header = read_header(data)
        assert header.keys() <= MAY_LEAVE[header["kind"]]
        if header["kind"] == MASKED:
            words = np.frombuffer(Envelope.unpack(data).tensors[WORDS].numpy().tobytes(), np.uint8)
            counts = np.bincount(words, minlength=256)
            expected = len(words) / 256
            assert chi2.sf(float(((counts - expected) ** 2).sum() / expected), 255) > 1e-6
    log = (tmp_path / "north" / "log.jsonl").read_text()
    assert log.count('"event":"unmasked"') == 3
    verify_folders([done.folder, *(tmp_path / name for name in SIZES)])


def test_examples_may_be_private_behind_masks(
    images: Path, key_folder: Path, tmp_path: Path
) -> None:
    """Noise before the masks; sites tell what they have spent, and no loss, not even in the sum."""
    given = sections(key_folder)
    given |= {"privacy": {"unit": "example", "noise_multiplier": 1.5, "delta": 1e-3}}
    given |= {"federation": {**FFA, "rounds": 1}}
    values = tree(images, **given)
    values["data"] |= {"batch_size": 4}
    policy = {"require": ["masked"]}
    sites = {n: site(images, tmp_path, key_folder, n, policy=policy) for n in SIZES}
    mail = FakeMail(sites)
    done, _ = coordinate_here(config_from_dict(values), tmp_path / "run", mail)
    (line,) = metrics(done.folder)[1:]
    assert line["epsilon"] > 0
    assert "loss" not in line
    assert done.summary["privacy"]["epsilon"] == line["epsilon"]
    assert done.summary["secure"]["aggregation"] == "masked"
    headers = [read_header(data) for _, data in mail.received]
    told = [header for header in headers if header["kind"] == MASKED]
    assert all(header.keys() <= MAY_LEAVE[MASKED] for header in told)
    assert max(header["epsilon"] for header in told) == line["epsilon"]
    kept = read_header((done.folder / "deploy" / LAST_SUM).read_bytes())
    assert kept["loss"] is None


def test_a_site_that_cannot_mask_says_what_it_lacks(
    images: Path, key_folder: Path, tmp_path: Path
) -> None:
    """Before it reads an image, and in words that name the key."""
    given = config_from_dict(tree(images, **sections(key_folder)))
    sites = {
        "north": trainer(images, tmp_path, "north").answer,
        "south": site(images, tmp_path, key_folder, "south", resident=False),
        "west": trainer(images, tmp_path, "west").answer,
    }
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in keys.site_folder(key_folder, "east").iterdir():
        if file.name != PEERS:
            (copy / file.name).write_bytes(file.read_bytes())
    sites["east"] = site(images, tmp_path, key_folder, "east", keys=str(copy))
    with pytest.raises(TrainingFailed, match="0 of 4 sites have come"):
        coordinate_here(given, tmp_path / "run", FakeMail(sites))
    said = (tmp_path / "run" / "deploy" / "log.jsonl").read_text()
    for words in (
        "must have `keys` for masked sums",
        "must have `resident: true` for masked sums",
        "is missing: the list of the sites' keys",
    ):
        assert words in said


def test_a_coordinator_needs_keys_and_three_sites(
    images: Path, key_folder: Path, tmp_path: Path
) -> None:
    config = config_from_dict(tree(images, **sections(key_folder, keys=None)))
    with pytest.raises(UsageError, match=r"deploy.keys: secure.aggregation: masked needs keys"):
        coordinate(config, tmp_path / "run", print)
    two = tmp_path / "two"
    keys.init(two, ["localhost"])
    for name in ("a", "b"):
        keys.site(two, name)
    config = config_from_dict(tree(images, **sections(two)))
    with pytest.raises(UsageError, match="needs 3 clients a round at least, got 2"):
        coordinate(config, tmp_path / "run", print)
    with pytest.raises(UsageError, match="keys of 2 sites, and masked sums need 3"):
        write_peers(two)
