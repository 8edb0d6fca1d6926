"""Data sets in memory: tables of `datasets`, arrays, lists; and what is refused, by argument."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedclip.config.lookup import giving
from fedclip.data.datasets import load_source
from fedclip.data.sources.memory import in_memory
from fedclip.errors import FedclipWarning, UsageError

datasets = pytest.importorskip("datasets")

GREY = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5)
COLOUR = np.stack([GREY] * 3, axis=-1)
NAMES = ["cat", "dog"]
ARRAYS = {"images": COLOUR, "labels": [0, 1, 1, 0], "class_names": NAMES}


def table(n: int = 4, **columns):
    """A table of pictures with a ClassLabel and further columns, each with its kind."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    values = {"image": [COLOUR[i % 4] for i in range(n)], "label": [i % 2 for i in range(n)]}
    for name, (kind, column) in columns.items():
        features[name], values[name] = kind, column
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


@pytest.mark.parametrize(
    "images",
    [COLOUR, torch.tensor(COLOUR), list(COLOUR), [Image.fromarray(one) for one in COLOUR]],
    ids=["array", "tensor", "arrays", "PIL"],
)
def test_images_of_every_form_are_the_same_pictures(images):
    source = in_memory(ARRAYS | {"images": images})
    assert source.labels.tolist() == [0, 1, 1, 0]
    assert source.class_names == ("cat", "dog")
    for number, picture in enumerate(COLOUR):
        assert (np.asarray(source.images.open(number)) == picture).all()
    assert len(set(source.digests(range(4)))) == 4


def test_grey_arrays_and_texts_as_labels():
    source = in_memory({"images": GREY, "labels": ["dog", "cat", None, "dog"]})
    assert (source.class_names, source.labels.tolist()) == (("cat", "dog"), [1, 0, -1, 1])
    assert (np.asarray(source.images.open(1)) == COLOUR[1]).all()
    named = in_memory({"images": GREY, "labels": ["b", "a", "b", "b"], "class_names": ["b", "a"]})
    assert named.labels.tolist() == [0, 1, 0, 0]


def test_sites_splits_and_captions():
    source = in_memory(
        {
            "images": GREY,
            "captions": ["a cat", "a dog", " a cat ", "two dogs"],
            "sites": ["north", "south", "north", "south"],
            "split": ["train", "train", "validation", "test"],
        }
    )
    assert source.captioned
    assert source.class_names == ("a cat", "a dog", "two dogs")
    assert source.labels.tolist() == [0, 1, 0, 2]
    assert (source.site_names, source.sites.tolist()) == (("north", "south"), [0, 1, 0, 1])
    assert source.is_test.tolist() == [False, False, False, True]
    assert source.is_validation.tolist() == [False, False, True, False]


def test_tables_by_split_with_sites_and_any_format():
    town = (datasets.Value("string"), ["b", "a", "b", "a"])
    parts = {"train": table(site=town).with_format("torch"), "test": table(site=town)}
    for data in (parts, datasets.DatasetDict(parts)):
        source = in_memory(data)
        assert (source.name, source.class_names) == ("given", ("cat", "dog"))
        assert source.is_test.tolist() == [False] * 4 + [True] * 4
        assert source.site_names == ("a", "b")
        assert (np.asarray(source.images.open(5)) == COLOUR[1]).all()
    rows = table().select([2, 3, 1])
    assert in_memory(rows).labels.tolist() == [0, 1, 1]
    assert (np.asarray(in_memory(rows).images.open(0)) == COLOUR[2]).all()


def test_a_table_names_files_anywhere(tmp_path, monkeypatch):
    Image.fromarray(COLOUR[0]).save(tmp_path / "one.png")
    monkeypatch.chdir(tmp_path)
    names = {"image": [str(tmp_path / "one.png"), "one.png"], "caption": ["a cat", "a dog"]}
    found = datasets.Dataset.from_dict(names).cast_column("image", datasets.Image())
    source = in_memory(found)
    assert source.captioned
    for number in range(2):
        assert (np.asarray(source.images.open(number)) == COLOUR[0]).all()


def test_a_split_of_another_name_is_left_out_with_a_warning():
    with pytest.warns(FedclipWarning, match="left out: extra"):
        assert len(in_memory({"train": table(4), "extra": table(4)})) == 4


TWO = {"a": (datasets.ClassLabel(names=["x"]), [0] * 4)}
WRONG = [
    (lambda: 3, "data must be a datasets.Dataset"),
    (lambda: COLOUR, "data must be a datasets.Dataset"),
    (dict, "data must be"),
    (lambda: {"pictures": 3}, "data must be"),
    (lambda: ARRAYS | {"lables": 3}, "unknown key 'lables'"),
    (lambda: {"images": COLOUR}, "either labels or captions"),
    (lambda: ARRAYS | {"captions": ["a"] * 4}, "either labels or captions"),
    (lambda: ARRAYS | {"images": COLOUR / 255}, r"data\['images'\].*float64.*\* 255"),
    (lambda: ARRAYS | {"images": COLOUR.astype(int)}, r"data\['images'\].*int64"),
    (lambda: ARRAYS | {"images": np.moveaxis(COLOUR, -1, 1)}, "moveaxis"),
    (lambda: ARRAYS | {"images": COLOUR[..., :1]}, "squeeze"),
    (lambda: ARRAYS | {"images": COLOUR[0]}, "one colour image or 6 grey ones"),
    (lambda: ARRAYS | {"images": COLOUR[:0]}, r"data\['images'\]"),
    (lambda: ARRAYS | {"images": []}, "is empty"),
    (lambda: ARRAYS | {"images": [COLOUR[0], None]}, r"data\['images'\]\[1\].*None"),
    (lambda: ARRAYS | {"images": ["a.png"] * 4}, r"data\['images'\]\[0\].*'a.png'"),
    (lambda: ARRAYS | {"images": [COLOUR[0] / 255]}, r"data\['images'\]\[0\].*float64"),
    (lambda: ARRAYS | {"labels": [0, 1]}, r"data\['labels'\].*4 images, got 2"),
    (lambda: ARRAYS | {"labels": np.eye(4)}, r"data\['labels'\] must hold whole numbers"),
    (lambda: ARRAYS | {"labels": [0.0, 1, 1, 0]}, r"data\['labels'\] must hold whole"),
    (lambda: ARRAYS | {"labels": [True, 1, 1, 0]}, r"data\['labels'\] must hold whole"),
    (lambda: ARRAYS | {"labels": [0, "cat", 1, 0]}, "and not both"),
    (lambda: ARRAYS | {"labels": "cats"}, r"data\['labels'\] must be a list"),
    (lambda: ARRAYS | {"labels": [0, 1, 2, 0]}, "holds 2, which is none of the 2 classes"),
    (lambda: ARRAYS | {"labels": [0, 1, -2, 0]}, "holds -2"),
    (lambda: ARRAYS | {"labels": ["cat", "cow"] * 2}, "holds 'cow'.*cat, dog"),
    (lambda: ARRAYS | {"class_names": None}, "class_names.* must name the classes"),
    (lambda: ARRAYS | {"class_names": "cat"}, r"data\['class_names'\] must be a list"),
    (lambda: ARRAYS | {"class_names": ["cat", ""]}, r"data\['class_names'\] must be a list"),
    (lambda: ARRAYS | {"split": ["train"] * 3 + ["dev"]}, r"data\['split'\].*'dev'"),
    (lambda: ARRAYS | {"sites": [0.5] * 4}, r"data\['sites'\]"),
    (lambda: table().remove_columns("image"), "data: the table has no image column"),
    (lambda: table().remove_columns("label"), "data: the table has no label column"),
    (
        lambda: table(a=(datasets.Image(), list(COLOUR))).rename_column("image", "b"),
        "data: the table has several image columns.*rename_column",
    ),
    (lambda: table(**TWO).rename_column("label", "b"), "several label columns"),
    (
        lambda: table(target=(datasets.Value("int64"), [0] * 4)).rename_column("label", "class"),
        "several columns for 'label': class, target",
    ),
    (lambda: datasets.DatasetDict(test=table()), "no train split; it has test"),
    (lambda: table().to_iterable_dataset(), "streamed"),
    (lambda: table().with_transform(lambda rows: rows), "transform"),
]


@pytest.mark.parametrize(("make", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_is_refused_by_argument(make, words):
    with pytest.raises(UsageError, match=words) as caught:
        in_memory(make())
    assert str(caught.value).startswith("data")


@given(st.lists(st.sampled_from([-1, 0, 1, None]), min_size=4, max_size=4))
@settings(max_examples=25, deadline=None)
def test_labels_stay_with_their_images(labels):
    source = in_memory(ARRAYS | {"labels": labels})
    assert source.labels.tolist() == [-1 if label is None else label for label in labels]


def test_the_name_given_is_known_only_while_it_is_given():
    source = in_memory(ARRAYS)
    with giving({"data_sets": lambda path, layout: source}):
        assert load_source("given", class_names=["dog", "cat"]).labels.tolist() == [1, 0, 0, 1]
    with pytest.raises(UsageError, match=r"data.name: given stands for .* fedclip.run\(config"):
        load_source("given")
