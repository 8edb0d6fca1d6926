"""Photographs that are much larger than a model's input: what a run says of them, and where."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedclip.config.loading import config_from_dict
from fedclip.data import picture_sizes
from fedclip.data.cache import cache_folder
from fedclip.data.picture_sizes import median_size, shrunk
from fedclip.data.source import ArrayImages, FileImages
from fedclip.deploy.site.config import SiteConfig
from fedclip.deploy.site.policy import preflight
from fedclip.errors import FedclipWarning
from fedclip.experiment.build import load_data
from fedclip.models.pretrained import advice_on_size
from fedclip.reports.listener import Listener
from tests.conftest import Command
from tests.support.machines import FakeMail, coordinate_here, trainer, tree, write_images

CONFIG = """
model: {model_name: tiny}
client: {learning_rate: 0.01}
data: {name: imagefolder, path: PATH, layout: classes, test_fraction: 0.4}
federation: {rounds: 1, num_clients: 2}
"""
SHRUNK = "shrink 7.5-fold, from 240 x 240 pixels (the median) to the model's 32 x 32"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cloth of 240 x 240 pixels: plain, striped, and with a mark of 8 pixels; five are .heic."""
    root, draw = tmp_path_factory.mktemp("cloth"), np.random.default_rng(0)
    for name in ("plain", "striped", "marked"):
        (root / name).mkdir()
        for i in range(10):
            pixels = draw.integers(100, 140, (240, 240, 3), np.uint8)
            if name == "striped":
                pixels[:, ::40] = 230
            if name == "marked":
                top, left = draw.integers(0, 232, 2)
                pixels[top : top + 8, left : left + 8] = 250
            Image.fromarray(pixels).save(root / name / f"{i}.jpg")
    for i in range(5):
        (root / "plain" / f"x{i}.heic").write_bytes(b"x")
    return root


@pytest.fixture(scope="module")
def small(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without those of another type."""
    root = tmp_path_factory.mktemp("small") / "cloth"
    shutil.copytree(photographs, root, ignore=shutil.ignore_patterns("*.heic"))
    return root


def test_a_run_tells_what_is_lost(fedclip: Command, photographs: Path, tmp_path: Path) -> None:
    config, run = tmp_path / "cloth.yaml", tmp_path / "run"
    config.write_text(CONFIG.replace("PATH", str(photographs)))
    code, out, err = fedclip("run", config, "--output", run)
    assert code == 0, err
    assert err.count(SHRUNK) == 1
    assert "openai/clip-vit-base-patch32" in err
    assert "a folder on disk" in err
    assert "5 .heic" in err
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["input_size"], summary["shrunk"]) == (32, 7.5)
    assert summary["majority_class_rate"] == pytest.approx(1 / 3, abs=0.1)
    assert 0 <= summary["macro_f1"] <= 1
    worst = summary["worst_class"]
    assert worst.keys() == {"name", "recall"}
    lines = "\n".join(out.splitlines()[-7:])
    assert f"majority-class rate {summary['majority_class_rate']:.3f}" in lines
    assert f"macro-F1 {summary['macro_f1']:.3f}" in lines
    assert f"worst class: {worst['name']}, recall {worst['recall']:.3f}" in lines
    _, card, _ = fedclip("card", run)
    assert f"after: {worst['name']}, recall {worst['recall']:.3f} |" in card
    assert f"| majority-class rate | {summary['majority_class_rate']:.3f} |" in card
    assert "The model sees 32 x 32 pixels" in card
    assert "shrunk 7.5-fold" in card
    for target in (run, config):
        _, shown, _ = fedclip("info", target)
        assert next(line for line in shown.splitlines() if "input size" in line).split()[-1] == "32"
    _, facts, _ = fedclip("info", run, "--json")
    assert json.loads(facts)["input_size"] == 32


def test_looking_at_the_data_says_it_too(
    fedclip: Command, photographs: Path, tmp_path: Path
) -> None:
    config = tmp_path / "cloth.yaml"
    config.write_text(CONFIG.replace("PATH", str(photographs)))
    code, out, err = fedclip("validate", "--data", config)
    assert code == 0, err
    assert err.count(SHRUNK) == 1
    assert "5 .heic" in out
    assert "7.5-fold" in out


def test_a_site_learns_the_size_of_its_images(small: Path, tmp_path: Path) -> None:
    data = {"path": str(small)}
    site = SiteConfig.model_validate({"name": "oslo", "data": data, "state": str(tmp_path / "s")})
    assert preflight(site)["median_image"] == "240 x 240"


def test_a_sites_log_says_it(tmp_path: Path) -> None:
    images, said = write_images(tmp_path / "images", {"north": 10}), list[str]()
    for file in (images / "sites").glob("*/*/*.png"):
        Image.open(file).resize((240, 240)).save(file)
    site = trainer(images, tmp_path, "north")
    site._say = said.append
    sections = {"federation": {"rounds": 1, "num_clients": 1}}
    config = config_from_dict(tree(images, **sections))
    coordinate_here(config, tmp_path / "run", FakeMail({"north": site.answer}))
    assert sum(SHRUNK in line and line.startswith("note: ") for line in said) == 1


@pytest.mark.parametrize(("side", "told"), [(128, False), (129, True)])
def test_it_is_said_from_more_than_fourfold(side: int, told: bool, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(6):  # the shorter side counts
            Image.new("RGB", (300, side), (10 * i, 0, 0)).save(tmp_path / name / f"{i}.png")
    config = config_from_dict(
        {
            "data": {"name": "imagefolder", "path": str(tmp_path), "layout": "classes"},
            "federation": {"num_clients": 1},
        }
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FedclipWarning)
        load_data(config, Listener())
    assert [str(w.message).count(f"300 x {side}") for w in caught] == [1] * told


def test_it_is_the_same_from_the_cache(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDCLIP_CACHE", str(tmp_path))
    data = {"name": "imagefolder", "path": str(small), "layout": "classes", "memory_gb": 1e-6}
    config = config_from_dict({"data": data, "federation": {"num_clients": 1}})
    for _ in range(2):
        with pytest.warns(FedclipWarning, match="240 x 240"):
            assert load_data(config, Listener()).median_size == (240, 240)
    assert len(list(cache_folder().glob("pixels-*"))) == 1


def test_the_median_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(10, 90), (50, 20), (30, 30), (7, 100), (60, 40)]  # shorter sides 7 10 20 30 40
    for i, size in enumerate(sizes):
        Image.new("L", size).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_bytes(b"no picture")
    images = FileImages(tmp_path, tuple(f"{i}.png" for i in range(6)))
    assert median_size(images, np.arange(6)) == (50, 20)
    assert median_size(images, np.arange(4)) == (10, 90)  # of 7 10 20 30, the lower
    assert median_size(images, np.array([5])) is median_size(images, np.arange(0)) is None
    assert median_size(ArrayImages(np.zeros((9, 8, 6), np.uint8), "x"), np.arange(9)) == (6, 8)
    monkeypatch.setattr(picture_sizes, "SAMPLE", 3)
    assert median_size(images, np.arange(5)) == (30, 30)  # of the first, the third and the last
    assert shrunk((50, 20), 32) == 0.625
    assert shrunk(None, 32) is None


def test_other_models_have_other_advice() -> None:
    assert advice_on_size("tiny") == advice_on_size("random:tiny") != advice_on_size("/models/own")
    assert "336" in advice_on_size("openai/clip-vit-base-patch32")
