"""Folders of images: layouts, splits, what is passed over, and every refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedclip.data.datasets import load_source
from fedclip.errors import FedclipWarning, UsageError


def make(root: Path, *files: str) -> Path:
    """Empty folders (names ending in /) and small pictures, each of its own colour."""
    for number, name in enumerate(files):
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 3), (number, 0, 0)).save(path)
    return root


def load(root: Path, layout: str = "auto", **names):
    return load_source("imagefolder", path=str(root), layout=layout, **names)


def test_one_level_of_folders_is_classes(tmp_path):
    source = load(make(tmp_path, "dog/b.png", "cat/1.jpg", "cat/2.JPEG", "zebra_crossing/x.webp"))
    assert source.class_names == ("cat", "dog", "zebra crossing")
    assert source.labels.tolist() == [0, 0, 1, 2]
    assert [Path(source.images.path_of(i)).name for i in range(4)] == [
        "1.jpg",
        "2.JPEG",
        "b.png",
        "x.webp",
    ]
    assert source.sites is None
    assert source.is_test is None


def test_two_levels_are_sites_and_classes_come_from_their_union(tmp_path):
    source = load(
        make(tmp_path, "oslo/cat/1.png", "oslo/dog/1.png", "bonn/dog/1.png", "bonn/ape/1.png")
    )
    assert source.site_names == ("bonn", "oslo")
    assert source.class_names == ("ape", "cat", "dog")
    assert source.sites.tolist() == [0, 0, 1, 1]
    assert source.labels.tolist() == [0, 2, 1, 2]


@pytest.mark.parametrize("names", [("train", "test", "val"), ("Training", "testing", "valid")])
def test_split_folders_on_top(tmp_path, names):
    train, test, validation = names
    source = load(
        make(
            tmp_path,
            f"{train}/cat/1.png",
            f"{train}/dog/2.png",
            f"{test}/cat/3.png",
            f"{test}/dog/4.png",
            f"{validation}/dog/5.png",
        )
    )
    by_name = {Path(source.images.path_of(i)).name: i for i in range(5)}
    assert source.is_test[[by_name["3.png"], by_name["4.png"]]].all()
    assert source.is_test.sum() == 2
    assert np.flatnonzero(source.is_validation).tolist() == [by_name["5.png"]]


def test_sites_under_split_folders(tmp_path):
    source = load(
        make(
            tmp_path,
            "train/oslo/cat/1.png",
            "train/bonn/cat/2.png",
            "test/oslo/cat/3.png",
            "test/bonn/dog/4.png",
        )
    )
    assert source.site_names == ("bonn", "oslo")
    assert source.class_names == ("cat", "dog")
    assert source.sites[source.is_test].tolist() == [0, 1]


@pytest.mark.parametrize("layout", ["auto", "sites"])
def test_sites_to_train_on_and_a_central_test_set_without_sites(tmp_path, layout):
    root = make(tmp_path, "train/oslo/cat/1.png", "train/bonn/cat/2.png", "test/cat/3.png")
    source = load(root, layout)
    assert source.sites[source.is_test].tolist() == [-1]
    assert source.class_names == ("cat",)


def test_a_class_may_be_called_train(tmp_path):
    assert load(make(tmp_path, "train/1.png", "car/1.png")).class_names == ("car", "train")


def test_valid_and_invalid_are_classes(tmp_path):
    assert load(make(tmp_path, "valid/1.png", "void/1.png")).class_names == ("valid", "void")


def test_hidden_and_other_files_are_passed_over(tmp_path):
    root = make(tmp_path, "cat/1.png", "dog/1.png", ".git/cat/1.png", "cat/.hidden.png")
    make(tmp_path, "__MACOSX/cat/1.png")
    (root / "cat" / "Thumbs.db").write_text("no picture")
    (root / "labels.csv").write_text("no picture")
    assert len(load(root)) == 2


def test_empty_class_folders_count_as_classes(tmp_path):
    assert load(make(tmp_path, "cat/1.png", "dog/")).class_names == ("cat", "dog")


def test_an_empty_site_is_known(tmp_path):
    source = load(make(tmp_path, "a/cat/1.png", "b/cat/1.png", "c/", "d/dog/"))
    assert source.site_names == ("a", "b", "c", "d")
    assert source.class_names == ("cat", "dog")
    assert set(source.sites.tolist()) == {0, 1}


def test_numbered_classes_are_in_order_of_value(tmp_path):
    root = make(tmp_path, *[f"{number}/1.png" for number in range(12)])
    assert load(root).class_names == tuple(map(str, range(12)))


def test_links_are_followed_and_never_for_ever(tmp_path):
    root = make(tmp_path / "data", "cat/1.png", "dog/1.png")
    make(tmp_path / "elsewhere", "2.png")
    (root / "ape").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "cat" / "loop").symlink_to(root, target_is_directory=True)
    assert load(root).class_names == ("ape", "cat", "dog")


def test_layout_classes_takes_deeper_folders_into_the_class(tmp_path):
    root = make(tmp_path, "cat/2023/1.png", "cat/2024/1.png", "dog/2023/1.png", "dog/1.png")
    assert load(root, "classes").labels.tolist() == [0, 0, 1, 1]


def test_layout_sites_where_auto_cannot_tell(tmp_path):
    root = make(tmp_path, "oslo/cat/1.png", "bonn/dog/1.png")
    source = load(root, "sites")
    assert source.site_names == ("bonn", "oslo")
    assert load(root, "classes").class_names == ("bonn", "oslo")


@pytest.mark.parametrize(
    ("files", "layout", "words"),
    [
        (["1.png", "cat/1.png"], "auto", ["outside any class folder", "1.png", "<class>/*"]),
        (["1.png"], "classes", ["outside any class folder"]),
        (["cat/1.png", "oslo/cat/1.png"], "auto", ["depths", "cat", "oslo/cat", "data.layout"]),
        (["cat/1.png", "oslo/cat/1.png"], "sites", ["cat/1.png", "<site>/<class>/*"]),
        (["a/b/c/1.png"], "auto", ["3 deep: a/b/c"]),
        (["oslo/cat/1.png", "bonn/dog/1.png"], "auto", ["cannot tell", "bonn, oslo", "cat, dog"]),
        (["set/cat/1.png", "set/dog/1.png"], "auto", ["cannot tell sites from classes", "set"]),
        (["cat/train/1.png", "cat/test/2.png"], "auto", ["belong on top", "test, train"]),
        (["train/a/1.png", "test/a/1.png", "cat/1.png"], "auto", ["mixes", "test, train", "(cat)"]),
        (["train/", "test/cat/1.png"], "auto", ["no images below", "train"]),
        (["train/cat/1.png", "0.png"], "auto", ["outside any class folder", "0.png"]),
        (
            ["train/cat/1.png", "test/oslo/cat/1.png"],
            "auto",
            ["should hold <class>/*", "oslo/cat"],
        ),
        (
            ["train/a/cat/1.png", "train/b/cat/1.png", "test/a/b/cat/1.png"],
            "auto",
            ["<site>/<class>/*", "test"],
        ),
        (["cat/", "dog/"], "auto", ["no images below", "<site>/<class>/*", ".jpg"]),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(tmp_path, files, layout, words):
    make(tmp_path, *files)
    with pytest.raises(UsageError) as caught:
        load(tmp_path, layout)
    message = str(caught.value)
    assert message.startswith("data.path: ")
    for word in words:
        assert word in message


def test_paths_that_are_none(tmp_path):
    with pytest.raises(UsageError, match=r"data\.path: imagefolder needs the folder"):
        load_source("imagefolder")
    with pytest.raises(UsageError, match=r"nowhere does not exist"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"is a file, not a folder"):
        load(tmp_path / "file")


def test_classes_that_differ_in_spelling_only_are_one(tmp_path):
    root = make(tmp_path, "a/Red_Fox/1.png", "a/cat/1.png", "b/red fox/1.png", "b/cat/1.png")
    with pytest.warns(FedclipWarning, match="'Red_Fox' = 'red fox'"):
        assert load(root).class_names == ("Red Fox", "cat")


def test_class_names_rename(tmp_path):
    root = make(tmp_path, "n01/1.png", "n02/1.png")
    source = load(root, class_names=["tench", "goldfish"], templates=["a {} here"])
    assert source.class_names == ("tench", "goldfish")
    assert source.labels.tolist() == [0, 1]
    assert source.templates == ("a {} here",)


def test_class_names_in_another_order_keep_every_image_its_class(tmp_path):
    source = load(make(tmp_path, "cat/1.png", "red_fox/1.png"), class_names=["Red fox", "cat"])
    assert source.class_names == ("Red fox", "cat")
    assert source.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cat"], ["must name the 2 classes of imagefolder (cat, dog)", "got 1 (cat)"]),
        (["cat", "dog", "ape"], ["2 classes", "got 3 (cat, dog, ape)"]),
        (["ape", "ape"], ["'ape' and 'ape' are the same class"]),
        (["dog", "ape"], ["does not match", "dog stands in another place there (cat, dog)"]),
    ],
)
def test_class_names_that_do_not_match(tmp_path, names, words):
    make(tmp_path, "cat/1.png", "dog/1.png")
    with pytest.raises(UsageError) as caught:
        load(tmp_path, class_names=names)
    for word in ["data.class_names", *words]:
        assert word in str(caught.value)
