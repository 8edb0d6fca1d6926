"""Data sets that `datasets` opens, from local folders in its own formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from fedclip.data.datasets import load_source
from fedclip.errors import FedclipWarning, UsageError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def pictures(n: int) -> list[np.ndarray]:
    return [np.full((4, 5, 3), i, dtype=np.uint8) for i in range(n)]


def table(n: int = 4, kind=None, **columns):
    """A table of pictures with a ClassLabel, or with the given columns in its place."""
    kind = kind or datasets.ClassLabel(names=["red_fox", "ape"])
    features = {"image": datasets.Image(), "label": kind}
    values = {"image": pictures(n), "label": columns.pop("label", [i % 2 for i in range(n)])}
    for name, (column_kind, value) in columns.items():
        features[name], values[name] = column_kind, value
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def load(path, **names):
    return load_source("hub", path=str(path), **names)


def test_save_to_disk_with_splits(tmp_path):
    parts = {"train": table(4), "validation": table(2), "test": table(3)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    source = load(tmp_path / "set")
    assert source.class_names == ("red fox", "ape")
    assert source.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert source.is_validation.tolist() == [False] * 4 + [True] * 2 + [False] * 3
    assert source.is_test.tolist() == [False] * 6 + [True] * 3
    assert np.asarray(source.images.open(3)).max() == 3
    assert source.images.open(0).size == (5, 4)
    assert source.images.path_of(7).startswith(f"{tmp_path / 'set'}[7]")
    assert load(tmp_path / "set", class_names=["fox", "monkey"]).class_names == ("fox", "monkey")


def test_a_bare_table_is_training(tmp_path):
    table(4).save_to_disk(tmp_path / "set")
    source = load(tmp_path / "set")
    assert len(source) == 4
    assert source.is_test is None


def test_parquet_folder_and_file(tmp_path, capfd):
    (tmp_path / "set" / "data").mkdir(parents=True)
    table(4).to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    table(3).to_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
    capfd.readouterr()
    source = load(tmp_path / "set")
    assert source.class_names == ("red fox", "ape")
    assert source.is_test.sum() == 3
    table(4).to_parquet(tmp_path / "one.parquet")
    capfd.readouterr()
    assert len(load(tmp_path / "one.parquet")) == 4
    assert capfd.readouterr().err == ""  # no progress bars in a log file
    assert not datasets.utils.are_progress_bars_disabled()


def test_folder_of_images(tmp_path):
    for split, name in (("train", "ape"), ("train", "fox"), ("test", "fox")):
        (tmp_path / "set" / split / name).mkdir(parents=True)
        Image.new("RGB", (3, 3)).save(tmp_path / "set" / split / name / "1.png")
    source = load(tmp_path / "set")
    assert source.class_names == ("ape", "fox")
    assert source.is_test.tolist() == [False, False, True]
    assert Path(source.images.path_of(0).split(" ")[1]).name == "1.png"
    assert source.images.open(0).size == (3, 3)


def test_text_labels_are_sorted_classes(tmp_path):
    values = ["pear", "apple", "pear", None]
    table(4, datasets.Value("string"), label=values).save_to_disk(tmp_path / "set")
    with pytest.warns(FedclipWarning, match="1 images without a label are left out"):
        source = load(tmp_path / "set")
    assert source.class_names == ("apple", "pear")
    assert source.labels.tolist() == [1, 0, 1]


def test_hidden_labels_are_left_out(tmp_path):
    data = {"train": table(4), "test": table(2, label=[-1, -1])}
    datasets.DatasetDict(data).save_to_disk(tmp_path / "set")
    with pytest.warns(FedclipWarning, match="2 images without a label"):
        assert load(tmp_path / "set").is_test is None


@pytest.mark.parametrize(
    ("kind", "values", "names"),
    [
        ("int64", [3, 7, 3, -1], ("3", "7")),
        ("int32", [3, 7, 3, None], ("3", "7")),
        ("string", ["ape", "fox", "ape", "-1"], ("ape", "fox")),
        ("string", ["ape", "fox", "ape", " "], ("ape", "fox")),
    ],
)
def test_what_means_hidden_or_none_is_no_class(tmp_path, kind, values, names):
    test = table(2, datasets.Value(kind), label=[values[-1]] * 2)
    data = {"train": table(4, datasets.Value(kind), label=values), "test": test}
    datasets.DatasetDict(data).save_to_disk(tmp_path / "set")
    words = r"3 images without a label are left out \(train: 1 of 4, test: 2 of 2\)"
    with pytest.warns(FedclipWarning, match=words):
        source = load(tmp_path / "set")
    assert source.class_names == names
    assert source.labels.tolist() == [0, 1, 0]
    assert source.is_test is None


def test_rows_keep_their_numbers_where_some_are_left_out(tmp_path):
    table(5, label=[0, -1, 1, None, 1]).save_to_disk(tmp_path / "set")
    with pytest.warns(FedclipWarning, match="2 images without a label"):
        source = load(tmp_path / "set")
    assert source.places(np.arange(3)) == (0, 2, 4)


def test_labels_that_are_all_hidden_or_no_class_are_refused(tmp_path):
    table(3, label=[-1, -1, -1]).save_to_disk(tmp_path / "hidden")
    with pytest.raises(UsageError, match=r"all 3 images of .* are without a label"):
        load(tmp_path / "hidden")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    values = {"image": pictures(2), "label": [0, 5]}
    wrong = datasets.Dataset.from_dict(values, features=features)
    kind = datasets.ClassLabel(names=["fox", "ape"])
    wrong.info.features["label"] = kind  # as a file says that was written by other means
    wrong.save_to_disk(tmp_path / "wrong")
    with pytest.raises(UsageError, match="1 labels of hub are no number of a class, as 5"):
        load(tmp_path / "wrong")


def test_options_choose_label_and_site(tmp_path):
    kind = datasets.ClassLabel(names=["big", "small"])
    where = (datasets.Value("string"), ["oslo", "bonn", "oslo", "bonn"])
    table(4, size=(kind, [0, 0, 1, 1]), where=where).save_to_disk(tmp_path / "set")
    source = load(f"{tmp_path / 'set'}?label=size&site=where")
    assert source.class_names == ("big", "small")
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.site_names == ("bonn", "oslo")
    assert source.sites.tolist() == [1, 0, 1, 0]


def test_a_split_without_labels_is_left_out(tmp_path):
    data = {"train": table(4), "test": table(2).remove_columns("label")}
    datasets.DatasetDict(data).save_to_disk(tmp_path / "set")
    with pytest.warns(FedclipWarning, match="test split is left out"):
        assert len(load(tmp_path / "set")) == 4


def _without(column):
    return table(4).remove_columns(column)


@pytest.mark.parametrize(
    ("make", "query", "words"),
    [
        (lambda: _without("image"), "", ["no image column", "label (ClassLabel)"]),
        (lambda: _without("label"), "", ["no label column", "image (Image)", "?label="]),
        (
            lambda: table(4).rename_columns({"label": "a"}).add_column("b", [0] * 4),
            "?label=c",
            ["no column 'c'", "a (ClassLabel)", "b (Value)"],
        ),
        (lambda: table(4), "?image=label", ["'label' is no image column"]),
        (lambda: table(4), "?site=town", ["no column 'town'"]),
        (lambda: table(4), "?lable=x", ["unknown option lable", "known: config, revision"]),
        (lambda: table(4, datasets.Value("float32"), label=[0.5] * 4), "", ["no class labels"]),
        (lambda: datasets.DatasetDict({"test": table(4)}), "", ["no train split; it has test"]),
        (
            lambda: table(4, a=(datasets.ClassLabel(names=["x"]), [0] * 4)).rename_columns(
                {"label": "b"}
            ),
            "",
            ["several label columns", "a (ClassLabel)", "b (ClassLabel)"],
        ),
    ],
)
def test_columns_that_do_not_fit(tmp_path, make, query, words):
    make().save_to_disk(tmp_path / "set")
    with pytest.raises(UsageError) as caught:
        load(f"{tmp_path / 'set'}{query}")
    for word in ["data.path", *words]:
        assert word in str(caught.value)


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(UsageError, match=r"data\.path: cannot open 'nobody/nothing': .*HF_HUB_OFF"):
        load("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"cannot open '.*empty': .*save_to_disk"):
        load(tmp_path / "empty")
    with pytest.raises(UsageError, match=r"data\.path: hub needs a data set's id"):
        load_source("hub")


def test_rows_without_an_image_are_bad_images(tmp_path):
    data = datasets.Dataset.from_dict(
        {"image": [*pictures(2), None], "label": [0, 1, 0]},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
        ),
    )
    data.save_to_disk(tmp_path / "set")
    source = load(tmp_path / "set")
    assert source.fingerprint(range(3))
    with pytest.raises(ValueError, match="no image here"):
        source.images.open(2)


@pytest.mark.parametrize("outside", ["../secret.png", "{root}/secret.png", "in/../../secret.png"])
def test_cells_name_files_of_the_data_set_only(tmp_path, outside):
    folder = tmp_path / "set"
    (folder / "in").mkdir(parents=True)
    for place in (tmp_path / "secret.png", folder / "in" / "a.png", folder / "b.png"):
        Image.fromarray(pictures(8)[7]).save(place)
    path = outside.format(root=tmp_path)
    for cells, good in ((["in/a.png", str(folder / "b.png")], True), (["in/a.png", path], False)):
        struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        rows = pa.array([{"bytes": None, "path": cell} for cell in cells], type=struct)
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
        about = {"huggingface": json.dumps({"info": {"features": kinds.to_dict()}})}
        made = pa.table({"image": rows, "label": ["a", "b"]}).replace_schema_metadata(about)
        parquet.write_table(made, folder / "t.parquet")
        images = load(folder / "t.parquet").images
        assert np.asarray(images.open(0)).max() == 7
        if good:
            assert np.asarray(images.open(1)).max() == 7
            continue
        with pytest.raises(UsageError, match=r"row 1: .* is not below the data set's own folder"):
            load(folder / "t.parquet").fingerprint(range(2))
        with pytest.raises(UsageError, match="is not below"):
            images.open(1)


@pytest.mark.parametrize("named", ["../out.parquet", "https://example.org/x.parquet"])
def test_a_readme_names_files_of_its_own_folder_only(tmp_path, named):
    (tmp_path / "set").mkdir()
    table(4).to_parquet(tmp_path / "out.parquet")
    table(4).to_parquet(tmp_path / "set" / "in.parquet")
    readme = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n"
    (tmp_path / "set" / "README.md").write_text(readme.format("in.parquet"))
    assert len(load(tmp_path / "set")) == 4
    (tmp_path / "set" / "README.md").write_text(readme.format(named))
    with pytest.raises(UsageError, match=r"README|cannot open"):
        load(tmp_path / "set")


def test_a_readme_that_names_a_file_elsewhere_is_refused_by_that_name(tmp_path):
    (tmp_path / "set").mkdir()
    table(4).to_parquet(tmp_path / "out.parquet")
    readme = "---\nconfigs:\n- config_name: default\n  data_files: ../out.parquet\n---\n"
    (tmp_path / "set" / "README.md").write_text(readme)
    with pytest.raises(
        UsageError, match=r"README\.md, data_files of train: .*out\.parquet.*not below"
    ):
        load(tmp_path / "set")


@pytest.mark.parametrize("what", ["table", "split"])
def test_a_saved_set_names_tables_of_its_own_folder_only(tmp_path, what):
    datasets.DatasetDict({"train": table(4)}).save_to_disk(tmp_path / "set")
    table(4).save_to_disk(tmp_path / "out")
    if what == "split":
        (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "../out"]}')
    else:
        state = tmp_path / "set" / "train" / "state.json"
        about = json.loads(state.read_text())
        about["_data_files"] = [{"filename": "../../out/data-00000-of-00001.arrow"}]
        state.write_text(json.dumps(about))
    with pytest.raises(UsageError, match=r"\.json: .*out.* is not below the data set's own folder"):
        load(tmp_path / "set")


def test_each_caption_of_a_list_makes_a_pair(tmp_path):
    captions = [["a fox", "red"], ["an ape"], [], ["red", "a fox ", "an owl"]]
    values = {"image": pictures(4), "caption": captions}
    features = {"image": datasets.Image(), "caption": datasets.Sequence(datasets.Value("string"))}
    made = datasets.Dataset.from_dict(values, features=datasets.Features(features))
    datasets.DatasetDict({"train": made, "test": made.select([3])}).save_to_disk(tmp_path / "set")
    with pytest.warns(FedclipWarning, match=r"1 images without a caption .*train: 1 of 7"):
        source = load(f"{tmp_path / 'set'}?caption=caption")
    named = [source.class_names[i] for i in source.labels]
    once = ["a fox", "red", "an ape", "red", "a fox", "an owl"]
    assert named == [*once, *once[-3:]]
    rows = [int(np.asarray(source.images.open(i)).max()) for i in range(len(source))]
    assert rows == [0, 0, 1, 3, 3, 3, 3, 3, 3]
    assert source.is_test.tolist() == [False] * 6 + [True] * 3


def test_texts_that_read_alike_are_one_class_and_blank_cells_no_site(tmp_path):
    text = datasets.Value("string")
    breeds, places = ["Cat", "cat", "dog", " cat "], ["a", " a", "", "b"]
    table(4, breed=(text, breeds), place=(text, places)).save_to_disk(tmp_path / "set")
    with pytest.warns(FedclipWarning, match="values of the column 'breed' whose names differ in"):
        source = load(f"{tmp_path / 'set'}?label=breed&site=place")
    assert sorted(source.class_names) == ["cat", "dog"]
    assert [source.class_names[i] for i in source.labels] == ["cat", "cat", "dog", "cat"]
    assert source.site_names == ("a", "b")
    assert source.sites.tolist() == [0, 0, -1, 1]


def test_numbered_classes_must_differ_in_name(tmp_path):
    kind = datasets.ClassLabel(names=["crane", "dog", "Crane"])
    table(3, kind=kind, label=[0, 1, 2]).save_to_disk(tmp_path / "set")
    with pytest.raises(UsageError, match="'crane' and 'Crane' are the same class"):
        load(tmp_path / "set")
    names = ["crane bird", "dog", "crane machine"]
    assert load(tmp_path / "set", class_names=names).class_names == tuple(names)
