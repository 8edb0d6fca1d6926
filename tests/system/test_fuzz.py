"""A sample of damaged inputs of every kind: each is refused in one message, in time, or right."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fedclip
from benchmarks.fuzz import KINDS, fuzz
from fedclip.adapters.card import run_card
from fedclip.adapters.find_images import read_image
from fedclip.adapters.inspect import info, load_run_model
from fedclip.data.cache import BAD, DIGESTS, PIXELS, PixelCache
from fedclip.data.sources.imagefolder import imagefolder
from fedclip.data.sources.pairs import pairs
from fedclip.errors import FedclipWarning, UsageError
from fedclip.experiment.checkpoint import Checkpoint
from fedclip.experiment.folder import RunFolder
from fedclip.experiment.run import resume
from fedclip.files import file_sha256, parse_json
from fedclip.models.clip import create_clip_model
from tests.support.runs import CONFIG, StopAfter

SAMPLE = {"configs": 100, "checkpoints": 8, "adapters": 30, "runs": 10}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_damaged_inputs(kind: str) -> None:
    tally = fuzz(kind, SAMPLE.get(kind, 60), seed=1)  # the command's is 0: other cases
    assert set(tally.outcomes) <= {"refused", "accepted"}, tally.signatures
    assert len(tally.outcomes) == 2 or kind == "caches"  # some are taken, some refused


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.mark.parametrize("door", [info, run_card, load_run_model, resume])
@pytest.mark.parametrize(
    "change",
    [
        lambda summary: summary | {"accuracy": 0.99},
        lambda summary: {k: v for k, v in summary.items() if k != "summary_sha256"},
        lambda summary: summary | {"summary_sha256": None, "rounds": 7},
    ],
    ids=["another figure", "no digest", "null digest"],
)
def test_a_changed_summary_is_refused(run: Path, door: Any, change: Any) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(change(summary)))
    with pytest.raises(UsageError, match=r"summary\.json is damaged"):
        door(run)


@pytest.mark.parametrize("name", ["metrics.jsonl", "partition.json"])
def test_a_record_that_was_changed_after_the_end_is_named(run: Path, name: str) -> None:
    (run / name).write_bytes((run / name).read_bytes().replace(b"0", b"1"))
    with pytest.raises(UsageError, match=f"{name} is not the one that the run ended with"):
        info(run)


def test_a_configuration_that_was_changed_after_the_end_is_said(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("learning_rate: 0.01", "learning_rate: 0.03"))
    with pytest.warns(FedclipWarning, match=r"config\.yaml has changed since the run ended"):
        assert "Learning rate 0.03" in run_card(run)


@pytest.mark.parametrize("change", [{}, {"strategy": 5}, {"client_accuracy": {"min": "x"}}])
def test_a_summary_without_digests_is_checked_by_its_fields(
    run: Path, change: dict[str, Any]
) -> None:
    old = json.loads((run / "summary.json").read_text())
    del old["summary_sha256"], old["records_sha256"]
    (run / "summary.json").write_text(json.dumps(old | change if change else {}))
    with pytest.raises(UsageError, match=r"summary\.json is damaged: \w+"):
        run_card(run)


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "timing.jsonl"])
def test_a_pipe_in_a_files_place_is_not_waited_for(run: Path, name: str) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    if name != "summary.json":
        (run / "summary.json").unlink()  # so that the run goes on
    with pytest.raises(UsageError, match=r"not a regular file|not finished"):
        (run_card if name == "summary.json" else resume)(run)


def test_notes_without_their_own_digest_are_damaged(run: Path) -> None:
    notes = run / "adapter" / "fedclip.json"
    told = json.loads(notes.read_text())
    del told["notes_sha256"]
    notes.write_text(json.dumps(told | {"templates": ["a drawing of {}"]}))
    with pytest.raises(UsageError, match=r"fedclip\.json changed"):
        load_run_model(run)


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 1}', '[{"a": {"b": 1, "c": 2, "b": 3}}]', '{"x": 0, "\\u0078": 1}']
)
def test_a_key_that_stands_twice_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"the key '\w' stands there twice"):
        parse_json(text, "notes")


@pytest.mark.parametrize(
    "row",
    [{"site": True}, {"site": {"name": "oslo"}}, {"site": 1.5}, {"split": False}, {"split": []}],
)
def test_sites_and_splits_are_names(tmp_path: Path, row: dict[str, Any]) -> None:
    table = tmp_path / "pairs.jsonl"
    table.write_text(json.dumps({"image": "a.png", "caption": "a", **row}))
    with pytest.raises(UsageError, match=f"line 1: {next(iter(row))} must be a name"):
        pairs(str(table))


@pytest.mark.parametrize("columns", ["image,caption,caption", "image,caption,site,site"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, columns: str) -> None:
    (tmp_path / "pairs.csv").write_text(f"{columns}\na.png,a,b,c\n")
    with pytest.raises(UsageError, match="two columns of one name"):
        pairs(str(tmp_path / "pairs.csv"))


def test_a_table_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pairs.csv")
    with pytest.raises(UsageError, match="not a regular file"):
        pairs(str(tmp_path / "pairs.csv"))


def test_one_image_under_two_spellings_is_one_group(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("image,caption\na/1.png,x\na//1.png,y\n./a/1.png,z\na/2.png,z\n")
    groups = pairs(str(table)).groups
    assert groups is not None
    assert groups.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("target", ["x.png", "nowhere.png", "../dog/gone.png"])
def test_broken_links_among_images_are_counted(tmp_path: Path, target: str) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "good.png")
    (tmp_path / "cat" / "x.png").symlink_to(target)
    with pytest.warns(FedclipWarning, match="not read: 1 broken link; put files there"):
        assert len(imagefolder(str(tmp_path))) == 2


@pytest.mark.parametrize("bad", ["[[12, 'x']]", "[[-1, 'x']]", "[['0', 'x']]", "[[true, 'x']]"])
def test_a_cache_that_names_places_that_are_none_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    monkeypatch.setenv("FEDCLIP_CACHE", str(tmp_path))
    shape = (12, 3, 2, 2)

    def use() -> Any:
        return PixelCache("a", "b").load_or_make(shape, lambda: iter([(np.ones(shape, "u1"), [])]))

    use()
    folder = PixelCache("a", "b").folder
    (folder / BAD).write_text(bad.replace("'", '"'))
    digests = {name: file_sha256(folder / name) for name in (PIXELS, BAD)}
    (folder / DIGESTS).write_text(json.dumps(digests))
    with pytest.warns(FedclipWarning, match="decoded again"):
        assert use()[1] == []


# Three of our own for each kind.


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three rounds, stopped after the second."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(KeyboardInterrupt):
        fedclip.run(CONFIG, output=folder, listener=StopAfter(2))
    return folder


@pytest.fixture
def cut(half: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half, tmp_path / "run"))


LAST, BEFORE = "checkpoint.safetensors", "checkpoint_previous.safetensors"


def test_two_checkpoints_in_each_others_place(cut: Path) -> None:
    data = {name: (cut / name).read_bytes() for name in (LAST, BEFORE)}
    (cut / LAST).write_bytes(data[BEFORE])
    (cut / BEFORE).write_bytes(data[LAST])
    found = Checkpoint.load_usable(RunFolder(cut))
    assert found is not None
    assert found.finished_rounds == 1  # whole, and its metrics are there: an earlier moment


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_no_checkpoint(cut: Path, put: Callable[[Path], None]) -> None:
    (cut / LAST).unlink()
    put(cut / LAST)
    with pytest.raises(UsageError, match=r"checkpoint\.safetensors"):
        resume(cut)


def test_a_round_of_metrics_twice_is_refused(cut: Path) -> None:
    lines = (cut / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_bytes(b"".join([lines[0], lines[1], lines[1]]))
    with pytest.raises(UsageError, match="line 3 is damaged: expected the record of round 2"):
        resume(cut)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("adapter_config.json", '{"peft_type": "LORA", "r": 2, "r": 4}', "'r' stands there twice"),
        ("adapter_config.json", '{"peft_type": "LORA", "r": 1e400}', "adapter_config.json"),
        ("fedclip.json", '{"head": "text", "class_names": [["cat"]]}', "class_names.0"),
    ],
)
def test_odd_texts_beside_an_adapter(run: Path, name: str, text: str, says: str) -> None:
    (run / "adapter" / name).write_text(text)
    model = create_clip_model({"model_name": "random:tiny"}, class_names=["a", "b"])
    with pytest.raises(UsageError, match=says):
        model.load_adapter(run / "adapter")


@pytest.mark.parametrize("cut_at", [1, 40, 400])
def test_a_picture_that_was_cut_off_is_refused(tmp_path: Path, cut_at: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 30, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.jpg", quality=95)
    data = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(data[:-cut_at])
    with pytest.raises(UsageError, match="truncated"):
        read_image(tmp_path / "x.jpg")


@pytest.mark.parametrize("size", [(0, 5), (2**31 - 1, 2**31 - 1), (100_000, 100_000)])
def test_pictures_of_impossible_sizes_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "x.ppm").write_bytes(b"P6\n%d %d\n255\n" % size + b"\0" * 99)
    with pytest.raises(UsageError, match=r"x\.ppm"):
        read_image(tmp_path / "x.ppm")
