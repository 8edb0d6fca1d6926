"""Image-caption pairs: tables, shards, the hub's format; what is wrong with them."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from fedclip.config import DataConfig
from fedclip.config.loading import config_from_dict
from fedclip.data.captions import with_captions
from fedclip.data.datasets import load_source
from fedclip.data.loading import load_federated
from fedclip.data.sources.pairs import pairs
from fedclip.errors import FedclipWarning, UsageError
from fedclip.experiment.build import with_absolute_paths
from tests.support.captions import picture, rows_of, write_pairs
from tests.support.data import all_unique, everything, to_pixels

datasets = pytest.importorskip("datasets")


def load(num_clients=2, partition=None, **data):
    config = DataConfig(**{"name": "pairs", **data}, partition=partition or {})
    return load_federated(config, num_clients, 0, to_pixels, "key", captions=True)


# --- tables ---


def test_a_table_of_pairs(tmp_path):
    rows = rows_of(9, sites=2)
    for number, row in enumerate(rows):
        row["split"] = ["train", "val", "Test"][number % 3] if number < 6 else ""
    rows[0]["caption"] = " a red square\n"  # as it comes from a spreadsheet
    source = load_source("pairs", path=str(write_pairs(tmp_path, rows)))
    assert source.class_names == (
        "a red square",
        "a green square",
        "a blue square",
        "a white square",
    )
    assert source.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert source.is_validation.tolist() == [i in (1, 4) for i in range(9)]
    assert source.is_test.tolist() == [i in (2, 5) for i in range(9)]
    assert source.site_names == ("site 0", "site 1")
    assert source.sites.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0]
    assert source.images.path_of(3) == str(tmp_path / "images/3.png")
    assert source.captioned
    assert source.groups is None


def test_json_lines_and_tabs_say_the_same(tmp_path):
    rows = rows_of(5)
    table = write_pairs(tmp_path, rows)
    lines = tmp_path / "pairs.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    tabs = tmp_path / "pairs.tsv"
    tabs.write_text(table.read_text().replace(",", "\t"), encoding="utf-8")
    sources = [load_source("pairs", path=str(file)) for file in (table, lines, tabs)]
    for source in sources[1:]:
        assert source.class_names == sources[0].class_names
        assert source.labels.tolist() == sources[0].labels.tolist()
        assert source.images == sources[0].images


def test_sites_become_clients_and_splits_are_kept(tmp_path):
    rows = rows_of(40, sites=2)
    for number in range(8):
        rows[number]["split"] = "test"
    for row in rows[8:]:
        row["split"] = "train"
    data = load(path=str(write_pairs(tmp_path, rows)))
    assert [client.client_id for client in data.clients] == ["site 0", "site 1"]
    assert data.test.tolist() == list(range(8))
    assert data.captioned
    assert all_unique(data.test, *(client.train for client in data.clients))
    record = data.partition_record()
    assert record["captions"] == 4
    assert record["clients"][0]["train"].keys() == {"num_examples", "indices_sha256"}
    rows[9]["caption"] = "a white square"
    other = load(path=str(write_pairs(tmp_path, rows)))
    assert other.partition_record()["captions_sha256"] != record["captions_sha256"]


def test_without_sites_pairs_are_divided_evenly(tmp_path):
    data = load(path=str(write_pairs(tmp_path, rows_of(30))))
    assert data.partition["name"] == "iid"
    assert [len(everything(client)) for client in data.clients] == [15, 15]
    grown = load(3, {"name": "size"}, path=str(tmp_path / "pairs.csv"))
    assert [len(everything(client)) for client in grown.clients] == [5, 10, 15]


def test_an_image_of_several_captions_stays_on_one_side(tmp_path):
    rows = rows_of(20)
    rows += [row | {"caption": f"{row['caption']}, seen again"} for row in rows]
    data = load(1, path=str(write_pairs(tmp_path, rows)), test_fraction=0.3)
    (client,) = data.clients
    sides = [set(part % 20) for part in (client.train, client.validation, client.test)]
    assert not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]
    assert len(client.test) == 12


def test_a_capped_pool(tmp_path):
    path = str(write_pairs(tmp_path, rows_of(40)))
    data = load(2, path=path, max_train_examples=14)
    assert sum(len(client.train) for client in data.clients) == 14


def test_a_client_of_one_pair_is_left_out(tmp_path):
    rows = rows_of(20, sites=2)
    rows[0]["site"] = "lonely"
    with pytest.warns(FedclipWarning, match="single training pair or picture .*: lonely"):
        data = load(path=str(write_pairs(tmp_path, rows)))
    assert [client.client_id for client in data.clients] == ["site 0", "site 1"]
    path = str(write_pairs(tmp_path, rows_of(2)))
    with pytest.raises(UsageError, match="no client has two image-caption pairs"):
        load(path=path, validation_fraction=0.0)


def test_missing_images_are_left_out_or_refused(tmp_path):
    path = write_pairs(tmp_path, rows_of(20))
    (tmp_path / "images/3.png").unlink()
    with pytest.warns(FedclipWarning, match=r"1 of 20 images cannot be read: .*images/3\.png"):
        data = load(path=str(path))
    assert not any(3 in everything(client) for client in data.clients)
    with pytest.raises(UsageError, match=r"images/3\.png \(No such file"):
        load(path=str(path), on_bad_image="error")
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    with pytest.raises(UsageError, match="no image is left"):
        load(path=str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,text\na.png,a dog\n", "has no column 'caption'; its columns: image, text"),
        ("caption\na dog\n", "has no column 'image'"),
        ("", "has no column 'image'; its columns: none"),
        ("image,caption\n", "holds no pairs"),
        ("image,caption\na.png,\n", "line 2: every row needs a text under caption, got an empty"),
        ("image,caption\n,a dog\n", "line 2: every row needs a text under image"),
        ("image,caption\na.png\n", "line 2: every row needs a text under caption"),
        ("image,caption\na.png,a dog, asleep\n", "line 2: more cells than columns; put captions"),
        ("image,caption,split\na.png,a dog,dev\n", "split must be train, validation or test, got"),
        ('image,caption\na.png,"a dog\n', "cannot be read as a table"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    (tmp_path / "pairs.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        load_source("pairs", path=str(tmp_path / "pairs.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": "a.png"}', "line 1 has no column 'caption'"),
        ('{"image": "a.png", "caption": 3}', "line 1: every row needs a text under caption, got 3"),
        ('{"image": "a.png", "caption": null}', "got an empty one"),
        ('\n{"image": ', "line 2 is damaged"),
        ('["a.png", "a dog"]', "line 1: expected an object"),
    ],
)
def test_bad_lines(tmp_path, text, message):
    (tmp_path / "pairs.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        load_source("pairs", path=str(tmp_path / "pairs.jsonl"))


def test_bad_paths(tmp_path):
    with pytest.raises(UsageError, match="pairs needs a table"):
        load_source("pairs")
    with pytest.raises(UsageError, match="there is no file"):
        load_source("pairs", path=str(tmp_path / "none.csv"))
    with pytest.raises(UsageError, match="for a folder of images use"):
        load_source("pairs", path=str(tmp_path))
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read as a table"):
        load_source("pairs", path=str(tmp_path / "bytes.csv"))


# --- what captions do not go with ---


@pytest.mark.parametrize("name", ["dirichlet", "pathological", "shard"])
def test_partitions_by_classes_are_refused(tmp_path, name):
    path = str(write_pairs(tmp_path, rows_of(20)))
    with pytest.raises(UsageError, match=f"{name} divides by classes, which captions do not have"):
        load(path=path, partition={"name": name})


def test_captions_are_no_classes(tmp_path):
    path = str(write_pairs(tmp_path, rows_of(20)))
    with pytest.raises(UsageError, match="set task: contrastive"):
        load_federated(DataConfig(name="pairs", path=path), 2, 0, to_pixels, "key")
    with pytest.raises(UsageError, match=r"data\.class_names names classes"):
        load_source("pairs", path=path, class_names=["a"])
    with pytest.raises(UsageError, match=r"data\.shots counts images by class"):
        load(path=path, shots=2)
    with pytest.raises(UsageError, match="natural needs a data set with sites"):
        load(path=path, partition={"name": "natural"})


CONTRASTIVE = {"task": "contrastive", "data": {"name": "icons"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"name": "pairs"}}, "data.path must name the table of images and captions"),
        (
            {"task": "classification", "data": {"name": "pairs", "path": "p.csv"}},
            "task: classification needs classes",
        ),
        ({"data": {"name": "pairs", "path": "p.csv", "shots": 2}}, "data.shots counts"),
        (
            {"data": {"name": "pairs", "path": "p.csv", "class_names": ["a"]}},
            "data.name: pairs has no classes",
        ),
        ({"model": {"head": "linear"}}, "model.head: linear is a classifier"),
        ({"model": {"num_classes": 3}}, "task: contrastive has no classes"),
        ({"data": {"name": "icons", "batch_size": 1}}, "data.batch_size: 1 leaves a pair nothing"),
        ({"evaluation": {"other_data": ["digits"]}}, "evaluation.other_data measures classes"),
        ({"data": {"name": "icons", "train_classes": 0.5}}, "data.train_classes measures classes"),
        ({"task": "captioning"}, "task must be one of classification, contrastive"),
    ],
)
def test_configurations_that_do_not_fit(change, message):
    with pytest.raises(UsageError, match=message):
        config_from_dict(CONTRASTIVE | change)


def test_all_that_does_not_fit_is_said_at_once():
    wrong = {"model": {"head": "linear"}, "data": {"name": "icons", "batch_size": 1}}
    with pytest.raises(UsageError) as caught:
        config_from_dict({"task": "contrastive"} | wrong)
    assert "2 problems" in str(caught.value)


# --- classes as captions ---


def test_classes_give_captions_by_their_first_template():
    source = with_captions(load_source("icons"))
    assert source.class_names[0] == "an icon of a folder"
    assert len(source.class_names) == 110
    assert not source.captioned  # classes are still there to divide by


def test_classes_that_read_alike_are_one_caption():
    digits = load_source("digits")
    with pytest.warns(FedclipWarning, match=r"1 of 10 captions are the same .* 'the digit One' as"):
        alike = with_captions(replace(digits, class_names=("one", "One", *digits.class_names[2:])))
    assert len(alike.class_names) == 9
    assert np.array_equal(alike.labels == 0, digits.labels <= 1)


# --- shards and the hub's format ---


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def write_shard(path, colours, text="txt"):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, colour in enumerate(colours):
            image = io.BytesIO()
            picture(colour, number).save(image, "PNG")
            files = {"png": image.getvalue(), text: f"a {colour} square".encode()}
            for suffix, content in files.items():
                entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def test_shards(tmp_path, offline):
    write_shard(tmp_path / "shards/0.tar", ["red", "blue", "red"])
    write_shard(tmp_path / "shards/1.tar", ["blue", "white"])
    for name, path in (
        ("pairs", tmp_path / "shards/*.tar"),
        ("hub", tmp_path / "shards"),
    ):
        source = load_source(name, path=str(path))
        assert source.captioned
        assert source.class_names == ("a red square", "a blue square", "a white square")
        assert source.labels.tolist() == [0, 1, 0, 1, 2]
        assert np.asarray(source.images.open(3))[..., 2].mean() > 200
    by_shard = load_source("pairs", path=f"{tmp_path}/shards/*.tar?site=__url__")
    assert by_shard.site_names == ("0", "1")
    assert by_shard.sites.tolist() == [0, 0, 0, 1, 1]
    one = load_source("pairs", path=str(tmp_path / "shards/1.tar"))
    assert one.class_names == ("a blue square", "a white square")


def test_a_pattern_of_shards_is_kept_by_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"name": "pairs", "path": "shards/*.tar?site=__url__"}
    config = with_absolute_paths(config_from_dict({"task": "contrastive", "data": data}))
    assert config.data.path == f"{tmp_path.resolve()}/shards/*.tar?site=__url__"


def test_shards_that_are_not_there(tmp_path, offline):
    with pytest.raises(UsageError, match="cannot open"):
        load_source("pairs", path=str(tmp_path / "none-*.tar"))


def hub_table(**columns):
    size = len(next(iter(columns.values())))
    images = [np.full((4, 4, 3), i, np.uint8) for i in range(size)]
    return datasets.Dataset.from_dict(
        {"image": images, **columns},
        features=datasets.Features(
            {"image": datasets.Image()}
            | {
                name: datasets.List(datasets.Value("string"))
                if isinstance(values[0], list)
                else datasets.Value("int64" if isinstance(values[0], int) else "string")
                for name, values in columns.items()
            }
        ),
    )


def test_a_caption_column_of_the_hub(tmp_path, offline):
    table = hub_table(text=["a dog", "a cat ", "a dog", "", None], place=["x", "y", "x", "y", "y"])
    table.save_to_disk(tmp_path / "set")
    with pytest.warns(FedclipWarning, match="2 images without a caption are left out"):
        source = load_source("hub", path=f"{tmp_path / 'set'}?caption=text&site=place")
    assert source.class_names == ("a dog", "a cat")
    assert source.labels.tolist() == [0, 1, 0]
    assert source.site_names == ("x", "y")
    assert source.images.path_of(2).endswith("[2]")


def test_each_of_several_captions_makes_a_pair(tmp_path, offline):
    hub_table(caption=[["a dog", "a hound"], ["a cat"]]).save_to_disk(tmp_path / "set")
    source = load_source("hub", path=str(tmp_path / "set"))
    assert source.class_names == ("a dog", "a hound", "a cat")


def test_labels_come_before_captions_unless_they_are_asked_for(tmp_path, offline):
    hub_table(label=[0, 1], text=["one", "two"]).save_to_disk(tmp_path / "set")
    path = str(tmp_path / "set")
    assert load_source("hub", path=path).class_names == ("0", "1")
    assert load_source("hub", path=f"{path}?caption=text").class_names == ("one", "two")
    assert not load_source("hub", path=f"{path}?label=text").captioned
    with pytest.raises(UsageError, match="has no column 'words'"):
        load_source("hub", path=f"{path}?caption=words")
    with pytest.raises(UsageError, match="column 'label' holds no captions, but 0"):
        load_source("hub", path=f"{path}?caption=label")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("image", ["../a.png", "/etc/hostname", "x/../../a.png", "/proc/self/mem"])
def test_cells_name_files_below_the_tables_folder_only(tmp_path, kind, image):
    row = json.dumps({"image": image, "caption": "a"})
    text = {"csv": f"image,caption\n{image},a\n", "jsonl": f"{row}\n"}[kind]
    (tmp_path / f"table.{kind}").write_text(text)
    with pytest.raises(UsageError, match=rf"line \d.*{image}.* is not below the data set's own"):
        pairs(str(tmp_path / f"table.{kind}"))


def test_a_whole_path_below_the_tables_folder_is_read(tmp_path):
    (tmp_path / "t.csv").write_text(f"image,caption\n{tmp_path / 'a.png'},a\n")
    assert pairs(str(tmp_path / "t.csv")).images.path_of(0) == str(tmp_path / "a.png")


def test_deep_json_is_an_error_of_its_line(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"image":' * 3000 + "\n")
    with pytest.raises(UsageError, match="line 1 is damaged"):
        pairs(str(tmp_path / "t.jsonl"))
