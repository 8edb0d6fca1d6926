"""The data sets by name, and their prompts."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest

from fedclip.catalog import DATA_SETS
from fedclip.config.names import clean_class_name
from fedclip.data.datasets import load_source
from fedclip.data.prompts import PROMPTS, check_templates
from fedclip.data.source import some
from fedclip.data.sources import builtin as sources_builtin
from fedclip.errors import FedclipWarning, UsageError


def test_every_source_has_prompts():
    assert set(DATA_SETS) == set(PROMPTS)
    for prompts in PROMPTS.values():
        assert check_templates(prompts.templates) == prompts.templates


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        UsageError,
        match=r"data\.name must be one of digits, .*pairs, .*got 'mnist'",
    ):
        load_source("mnist")


def test_digits():
    source = load_source("digits")
    assert len(source) == 1797
    assert source.class_names[7] == "seven"
    assert np.bincount(source.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    first = np.asarray(source.images.open(0))
    assert first.shape == (8, 8, 3)
    assert first.max() == 239  # 15 of 16 levels
    assert source.is_test is None
    assert source.images.path_of(17) == "digits/17"


def test_digits_have_no_path():
    with pytest.raises(UsageError, match=r"data\.path: digits .*data\.name to imagefolder"):
        load_source("digits", path="pictures")


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + array.tobytes())


@pytest.fixture
def fashion(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 30), ("t10k", 20)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8) % 10)
    return tmp_path


def test_fashion_mnist_from_idx_files(fashion, monkeypatch):
    monkeypatch.setattr(sources_builtin, "FASHION_FOLDER", fashion)
    source = load_source("fashion_mnist")
    assert source.is_test.tolist() == [False] * 30 + [True] * 20
    assert source.labels[:12].tolist() == [*range(10), 0, 1]
    assert source.class_names[9] == "ankle boot"
    assert source.images.open(49).size == (28, 28)


def test_fashion_mnist_damaged(fashion):
    (fashion / "t10k-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(UsageError, match=r"t10k-images-idx3-ubyte.gz: damaged or missing"):
        load_source("fashion_mnist", path=str(fashion))


def test_fashion_mnist_path_without_files(tmp_path):
    with pytest.raises(UsageError, match=r"data\.path: no Fashion-MNIST in .*leave data\.path out"):
        load_source("fashion_mnist", path=str(tmp_path))


def test_fashion_mnist_nowhere_says_how_to_get_either(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_builtin, "FASHION_FOLDER", tmp_path)
    monkeypatch.setattr(sources_builtin, "FASHION_HUB", str(tmp_path / "hub"))
    with pytest.raises(UsageError) as caught:
        load_source("fashion_mnist")
    assert "apt-get install dataset-fashion-mnist" in str(caught.value)
    assert "hf download" in str(caught.value)


def test_fashion_mnist_from_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    images = [np.full((28, 28), 9, dtype=np.uint8)] * 4
    names = [f"hub name {i}" for i in range(10)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    part = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2, 9]}, features=features)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "hub")
    monkeypatch.setattr(sources_builtin, "FASHION_FOLDER", tmp_path)
    monkeypatch.setattr(sources_builtin, "FASHION_HUB", str(tmp_path / "hub"))
    source = load_source("fashion_mnist")
    assert source.name == "fashion_mnist"
    assert source.class_names == PROMPTS["fashion_mnist"].class_names
    assert source.is_test.sum() == 4
    assert np.asarray(source.images.open(0)).max() == 9


def icons_file(path):
    np.savez(
        path,
        images=np.zeros((6, 4, 4), dtype=np.uint8),
        label=np.array([0, 1, 0, 1, 0, 1], dtype=np.int16),
        family=np.array([0, 0, 0, 1, 1, 1], dtype=np.int16),
        drawing=np.arange(6, dtype=np.int32),
        split=np.array([0, 0, 1, 0, 0, 1], dtype=np.int8),
        class_names=np.array(["gear", "bell"]),
        family_names=np.array(["thin", "bold"]),
    )
    return path


def test_icons_are_grouped_by_drawing_and_family(tmp_path):
    source = load_source("icons", path=str(icons_file(tmp_path / "icons.npz")))
    assert source.class_names == ("gear", "bell")
    assert source.site_names == ("thin", "bold")
    assert source.sites.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.groups.tolist() == list(range(6))
    assert np.flatnonzero(source.is_test).tolist() == [2, 5]


def test_the_icons_that_come_with_the_package():
    source = load_source("icons")
    train, test = set(source.groups[~source.is_test]), set(source.groups[source.is_test])
    assert not train & test
    assert len(source) >= 4500
    assert source.is_test.sum() >= 1500
    assert len(source.class_names) >= 40
    assert len(source.site_names) >= 24
    for site in range(len(source.site_names)):
        assert len(np.unique(source.labels[source.sites == site])) >= 30


def test_icons_missing(tmp_path):
    with pytest.raises(UsageError, match=r"icons: no such file: .*reinstall fedclip"):
        load_source("icons", path=str(tmp_path / "none.npz"))


def test_some_of_many_names():
    assert some(["b", "a"]) == "b, a"
    assert some({"b", "a"}) == "a, b"
    assert some("abcd", limit=3) == "a, b, c and 1 more"


def test_class_names_from_folder_names():
    assert clean_class_name("golden_retriever__dog") == "golden retriever dog"
    assert clean_class_name("_") == "_"


@pytest.mark.parametrize("templates", [[], ["a photo"], ["{} and {}"], ["ok {}", "bad"]])
def test_templates_without_a_place_for_the_name(templates):
    with pytest.raises(UsageError, match=r"data\.templates: every template must hold \{\}"):
        load_source("digits", templates=templates)


# --- labels that mean none ---

OWN = """
import numpy as np
from fedclip.data.source import ArrayImages, ImageSource

LABELS = {labels}

def own(path=None, layout="auto"):
    pixels = np.arange(len(LABELS) * 4, dtype=np.uint8).reshape(-1, 2, 2)
    return ImageSource(
        "own", ArrayImages(pixels, "own"), np.array(LABELS), ("cat", "dog"), ("{{}}",),
        is_test=np.arange(len(LABELS)) >= 4,
    )
"""


def own_data(tmp_path, labels):
    file = tmp_path / f"own_{abs(hash(str(labels)))}.py"
    file.write_text(OWN.format(labels=labels))
    return f"{file}:own"


def test_a_label_of_none_never_becomes_the_last_class(tmp_path):
    name = own_data(tmp_path, [0, 1, -1, 0, -1, -1])
    words = r"own: 3 images without a label are left out \(train: 1 of 4, test: 2 of 2\)"
    with pytest.warns(FedclipWarning, match=words):
        source = load_source(name, class_names=("dog", "cat"))
    assert source.labels.tolist() == [1, 0, 1]
    assert source.is_test is None
    assert source.places(np.arange(3)) == (0, 1, 3)
    assert np.asarray(source.images.open(2))[0, 0, 0] == 12
    assert source.images.path_of(2) == "own/3"


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([-1, -1], "all 2 images of own are without a label"),
        ([0, 2, 1], "1 labels of own are no number of a class, as 2; there are 2 classes"),
        ([0, -2, 1], "1 labels of own are no number of a class, as -2"),
        ([0.5, 1.0], "the labels of own must be whole numbers"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, words):
    with pytest.raises(UsageError, match=words):
        load_source(own_data(tmp_path, labels))


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    source, theirs = load_source("digits"), load_digits()
    assert (source.labels == theirs.target).all()
    pixels = np.stack([np.asarray(source.images.open(i))[..., 0] for i in range(20)])
    assert (pixels == np.rint(theirs.images[:20] * (255 / 16))).all()
