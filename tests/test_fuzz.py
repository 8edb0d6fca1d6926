"""A sample of damaged inputs of every kind: each is refused in one message, in time, or right."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.fuzz import KINDS, fuzz
from fedclip.adapters.card import run_card
from fedclip.adapters.inspect import info, load_run_model
from fedclip.data.cache import BAD, DIGESTS, PIXELS, PixelCache
from fedclip.data.sources.imagefolder import imagefolder
from fedclip.data.sources.pairs import pairs
from fedclip.errors import FedclipWarning, UsageError
from fedclip.experiment.run import resume
from fedclip.files import file_sha256, parse_json

SAMPLE = {"configs": 150, "checkpoints": 16, "adapters": 50, "caches": 50, "runs": 25}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_damaged_inputs(kind: str) -> None:
    tally = fuzz(kind, SAMPLE.get(kind, 100), seed=1)  # the command's is 0: other cases
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
