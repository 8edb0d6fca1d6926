"""Folders of images to clients: sites, own splits, bad images, and what is warned of."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedclip.errors import FedclipWarning, UsageError
from tests.support.data import all_unique, everything, load


def picture(path: Path, level: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 5), (level, 0, 0) if mode == "RGB" else level).save(path)


@pytest.fixture
def sites(tmp_path) -> Path:
    """Three sites of two classes, ten JPEG and PNG pictures each."""
    for site in ("bonn", "oslo", "rome"):
        for kind, suffix in (("cat", "jpg"), ("dog", "png")):
            for i in range(10):
                picture(tmp_path / site / kind / f"{i}.{suffix}", 20 * i)
    return tmp_path


def test_folder_with_sites(sites):
    data = load(name="imagefolder", path=str(sites), num_clients=99)
    assert [client.client_id for client in data.clients] == ["bonn", "oslo", "rome"]
    assert data.table("train") == [[7, 7]] * 3
    assert data.table("validation") == [[1, 1]] * 3
    assert data.table("test") == [[2, 2]] * 3
    assert data.class_names == ("cat", "dog")


def test_folder_of_real_pictures_per_class(tmp_path):
    from sklearn.datasets import load_digits

    source = load_digits()
    for i in range(60):
        kind, suffix = source.target[i], ("jpg", "png")[i % 2]
        (tmp_path / f"digit_{kind}").mkdir(exist_ok=True)
        image = Image.fromarray((source.images[i] * 15).astype(np.uint8))
        image.save(tmp_path / f"digit_{kind}" / f"{i}.{suffix}")
    data = load(name="imagefolder", path=str(tmp_path), num_clients=3)
    assert data.class_names[3] == "digit 3"
    assert sum(map(sum, data.table())) == 60


def test_own_test_split_of_the_sites(sites):
    for site in ("bonn", "oslo", "rome"):
        (sites / "train").mkdir(exist_ok=True)
        (sites / site).rename(sites / "train" / site)
    for i in range(4):
        picture(sites / "test" / "oslo" / "cat" / f"{i}.png", i)
    data = load(name="imagefolder", path=str(sites))
    assert data.table("train") == [[9, 9]] * 3
    assert data.table("test") == [[0, 0], [4, 0], [0, 0]]
    assert len(data.test) == 4


def test_own_test_and_validation_without_sites(sites):
    (sites / "train").mkdir()
    for site in ("bonn", "oslo", "rome"):
        (sites / site).rename(sites / "train" / site)
    for i in range(4):
        picture(sites / "test" / "cat" / f"{i}.png", i)
        picture(sites / "val" / "dog" / f"{i}.png", i)
    data = load(name="imagefolder", path=str(sites))
    assert len(data.test) == len(data.validation) == 4
    assert data.counts(data.test) == [4, 0]
    assert data.counts(data.validation) == [0, 4]
    assert data.table("test") == [[2, 2]] * 3
    assert all_unique(data.test, data.validation, *[everything(c) for c in data.clients])


def test_bad_images_are_left_out_and_reported(sites):
    (sites / "oslo" / "cat" / "3.jpg").write_bytes(b"")
    (sites / "rome" / "dog" / "5.png").write_text("no picture")
    with pytest.warns(FedclipWarning, match=r"2 of 60 images cannot be read: .*3\.jpg.*; left out"):
        data = load(name="imagefolder", path=str(sites))
    assert [Path(bad.split(" (")[0]).name for bad in data.bad_images] == ["3.jpg", "5.png"]
    assert np.array(data.table()).tolist() == [[10, 10], [9, 10], [10, 9]]
    used = np.concatenate([everything(client) for client in data.clients])
    assert len(used) == 58
    with pytest.raises(UsageError, match="2 of 60 images cannot be read"):
        load(name="imagefolder", path=str(sites), on_bad_image="error")


def test_no_image_left(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "1.png").write_bytes(b"broken")
    with pytest.raises(UsageError, match=r"no image is left: 2 of 2 images"):
        load(name="imagefolder", path=str(tmp_path))


def test_empty_sites_are_refused_or_left_out(sites):
    (sites / "ulm").mkdir()
    for file in (sites / "bonn").rglob("*.*g"):
        file.write_bytes(b"broken")
    config = {"name": "imagefolder", "path": str(sites)}
    with (
        pytest.warns(FedclipWarning, match="20 of 60"),
        pytest.raises(UsageError, match=r"bonn \(20 images, none readable\), ulm; .*on_empty_site"),
    ):
        load(**config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load(**config, on_empty_site="skip")
    assert any("left out: bonn (20 images, none readable), ulm" in str(w.message) for w in caught)
    assert [client.client_id for client in data.clients] == ["oslo", "rome"]


def test_a_skipped_site_leaves_the_central_test_too(sites):
    (sites / "train").mkdir()
    for site in ("bonn", "oslo", "rome"):
        (sites / site).rename(sites / "train" / site)
    for site in ("oslo", "ulm"):
        picture(sites / "test" / site / "cat" / "1.png", 1)
    with pytest.raises(UsageError, match="without a usable training image: ulm"):
        load(name="imagefolder", path=str(sites))
    with pytest.warns(FedclipWarning, match="left out: ulm"):
        data = load(name="imagefolder", path=str(sites), on_empty_site="skip")
    assert len(data.test) == 1


def test_a_site_of_one_class_is_a_warning(sites):
    for i in range(5):
        picture(sites / "ulm" / "cat" / f"{i}.png", i)
    with pytest.warns(FedclipWarning, match="site ulm has images of one class only: cat"):
        load(name="imagefolder", path=str(sites))


def test_a_class_without_training_images_is_a_warning(sites):
    (sites / "oslo" / "emu").mkdir()
    with pytest.warns(FedclipWarning, match="1 of 3 classes have no training image: emu"):
        load(name="imagefolder", path=str(sites))


def test_too_small_a_cap_for_the_sites(sites):
    with pytest.raises(UsageError, match=r"data\.max_train_examples: 2 examples .* 3 sites"):
        load(name="imagefolder", path=str(sites), max_train_examples=2)
    data = load(name="imagefolder", path=str(sites), max_train_examples=21)
    assert data.table() == [[5, 5]] * 3  # 21 of 30 after the clients' 0.3
    assert [sum(row) for row in data.table("train")] == [7, 7, 7]


def test_nothing_to_test_on(sites):
    with pytest.raises(UsageError, match=r"data\.test_fraction: .*no test split"):
        load(name="imagefolder", path=str(sites), test_fraction=0)
