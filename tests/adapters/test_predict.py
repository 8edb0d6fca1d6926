"""`fedclip predict`: many images, files of predictions, bad images."""

from __future__ import annotations

import csv
import json
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedclip.adapters import inspect as inspection
from fedclip.adapters.find_images import find_images
from fedclip.adapters.predict import Predictor, predictions
from fedclip.adapters.prediction_files import as_csv, as_json, as_jsonl
from fedclip.errors import UsageError
from tests.conftest import Command


@pytest.fixture
def run(finished_run: Path) -> Path:
    return finished_run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images in two folders, and files that are none of them."""
    draw = np.random.default_rng(0)
    folder = tmp_path / "photos"
    (folder / "b").mkdir(parents=True)
    (folder / ".thumbs").mkdir()
    for name in ("2.png", "1.jpg", "b/3.PNG", "b/4.png", "b/5.webp", "b/6.bmp", ".thumbs/x.png"):
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    shutil.copy(folder / "2.png", folder / ".hidden.png")
    return folder


SIX = ["1.jpg", "2.png", "b/3.PNG", "b/4.png", "b/5.webp", "b/6.bmp"]


def test_a_folder_gives_its_images_by_name(photos: Path) -> None:
    assert find_images([photos]) == [str(photos / name) for name in SIX]


def test_patterns_give_images_and_folders_that_fit(photos: Path) -> None:
    assert find_images([photos / "*.*"]) == [str(photos / name) for name in SIX[:2]]
    assert find_images([photos / "*"]) == [str(photos / name) for name in SIX]
    assert find_images([photos / "**"]) == [str(photos / name) for name in SIX]
    assert find_images([photos / "**" / "*.png"]) == [
        str(photos / name) for name in ("2.png", "b/4.png")
    ]


def test_a_file_stands_for_itself_whatever_its_name(photos: Path) -> None:
    odd = photos / "a[1].dat"
    (photos / "2.png").rename(odd)
    assert find_images([odd, photos / "gone.png"]) == [str(odd), str(photos / "gone.png")]


@pytest.mark.parametrize(("argument", "kind"), [("empty", "folder"), ("*.gif", "pattern")])
def test_no_images_at_all_is_an_error(photos: Path, argument: str, kind: str) -> None:
    (photos / "empty").mkdir()
    with pytest.raises(UsageError, match=f"this {kind} has no images"):
        find_images([photos / argument])


def test_batches_change_no_prediction(run: Path, photos: Path) -> None:
    paths = find_images([photos])
    whole = inspection.predict(run, paths)
    heard: list[tuple[int, int]] = []
    pieces = predictions(
        Predictor.of_run(run), paths, batch_size=4, progress=lambda *at: heard.append(at)
    )
    for one, other in zip(whole, pieces, strict=True):
        assert (one["image"], one["label"]) == (other["image"], other["label"])
        for label, score in one["scores"].items():
            assert other["scores"][label] == pytest.approx(score, rel=1e-4)
    assert heard == [(4, 6), (6, 6)]


class Counting:
    """Stands in for a predictor: two classes, and how many images it was given at once."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def to_pixels(self, image: Image.Image) -> np.ndarray:
        return np.zeros((3, 64, 64), np.uint8)

    def classify(self, pixels: np.ndarray) -> list[dict[str, float]]:
        self.sizes.append(len(pixels))
        return [{"a": 0.75, "b": 0.25}] * len(pixels)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "one.png")

    def peak(number: int) -> int:
        found = predictions(Counting(), [str(tmp_path / "one.png")] * number, batch_size=8)  # type: ignore[arg-type]
        tracemalloc.start()
        try:
            assert sum(1 for _ in found) == number
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(8)  # imports of decoders
    assert peak(160) < 2 * peak(16)  # 160 images would be 2 MB, eight are 0.1 MB


def test_bad_images_fail_before_anything_is_classified(photos: Path) -> None:
    (photos / "b/9.png").write_bytes(b"no image")
    counting = Counting()
    with pytest.raises(UsageError, match=r"9\.png: not an image that can be read"):
        list(predictions(counting, find_images([photos]), batch_size=1))  # type: ignore[arg-type]
    assert counting.sizes == []


def test_bad_images_can_be_left_out(run: Path, photos: Path, fedclip: Command) -> None:
    (photos / "0.png").write_bytes(b"no image")
    shutil.copy(photos / "b/4.png", photos / "b/9.png")
    with (photos / "b/9.png").open("r+b") as file:
        file.truncate(300)
    code, out, err = fedclip(
        "predict", run, photos, "--on-bad", "skip", "--batch-size", "1", "--json"
    )
    assert code == 1
    assert [row["image"] for row in json.loads(out)] == [str(photos / name) for name in SIX]
    assert f"{photos}/0.png: not an image" in err
    assert f"{photos}/b/9.png: not an image" in err
    assert "2 of 8 images could not be read" in err
    code, out, err = fedclip("predict", run, photos)
    assert (code, out) == (2, "")
    assert f"{photos}/0.png: not an image" in err


TWO = [
    {"image": "a,b.png", "label": "cat", "confidence": 0.75, "scores": {"cat": 0.75, "dog": 0.25}},
    {"image": "ö.png", "label": "dog", "confidence": 0.5, "scores": {"dog": 0.5, "cat": 0.5}},
]


def test_formats_by_hand() -> None:
    assert "".join(as_csv(TWO, None)) == (
        'image,label,confidence\n"a,b.png",cat,0.75\nö.png,dog,0.5\n'
    )
    assert "".join(as_csv(TWO, 2)) == (
        "image,label,confidence,label_2,confidence_2\n"
        '"a,b.png",cat,0.75,dog,0.25\nö.png,dog,0.5,cat,0.5\n'
    )
    assert "".join(as_json(TWO, None)) == json.dumps(TWO, indent=2, ensure_ascii=False) + "\n"
    assert [json.loads(line) for line in as_jsonl(TWO, None)] == TWO
    assert json.loads("".join(as_json(TWO, 1)))[0]["scores"] == {"cat": 0.75}
    for form, empty in ((as_json, "[]\n"), (as_jsonl, ""), (as_csv, "image,label,confidence\n")):
        assert "".join(form([], None)) == empty


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_predictions_go_into_a_file(
    run: Path, photos: Path, fedclip: Command, tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"found{suffix}"
    code, out, _ = fedclip("predict", run, photos, "--output", file, "--top", "3")
    assert (code, out) == (0, f"6 predictions: {file}\n")
    text = file.read_text("utf-8")
    rows: Iterator[dict[str, object]]
    if suffix == ".csv":
        rows = iter(csv.DictReader(text.splitlines()))
        assert text.splitlines()[0].endswith("label_2,confidence_2,label_3,confidence_3")
    else:
        rows = iter(json.loads(text) if suffix == ".json" else map(json.loads, text.splitlines()))
    images = [row["image"] for row in rows]
    assert images == [str(photos / name) for name in SIX]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".part")] == []


def test_a_failure_leaves_the_old_file(
    run: Path, photos: Path, fedclip: Command, tmp_path: Path
) -> None:
    file = tmp_path / "found.csv"
    file.write_text("old")
    (photos / "0.png").write_bytes(b"no image")
    assert fedclip("predict", run, photos, "--output", file)[0] == 2
    assert file.read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "x.txt"], "--output must end in .csv, .json, .jsonl"),
        (["--output", "nowhere/x.csv"], "there is no folder nowhere"),
        (["--top", "0"], "--top"),
        (["--batch-size", "0"], "--batch-size"),
        (["--on-bad", "maybe"], "--on-bad"),
    ],
)
def test_bad_options(run: Path, fedclip: Command, arguments: list[str], message: str) -> None:
    code, out, err = fedclip("predict", run, "i.png", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_table_for_people(run: Path, photos: Path, fedclip: Command) -> None:
    code, out, _ = fedclip("predict", run, photos / "2.png", "--labels", "a [b], c", "--top", "2")
    assert code == 0
    heading, row = out.splitlines()
    assert heading.split() == ["image", "label", "confidence", "label", "2", "confidence", "2"]
    assert "a [b]" in row
