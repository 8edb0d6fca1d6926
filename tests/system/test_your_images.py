"""A user's own folder of images trains without any code: per class, and per site and class."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fedclip.data.datasets import load_source
from fedclip.errors import UsageError
from tests.conftest import Command

CONFIG = """
model: {model_name: tiny}
client: {learning_rate: 0.01, local_epochs: 2}
data: {name: imagefolder, path: PATH}
federation: {rounds: 2, num_clients: 2}
"""


@pytest.fixture(scope="module")
def clothing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion-MNIST, which is not part of the package, as `<site>/<class>/*` in JPEG and PNG."""
    try:
        source = load_source("fashion_mnist")
    except UsageError as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("clothing")
    for label in (1, 7, 8):  # trousers, sneaker, bag
        for i, index in enumerate(np.flatnonzero(source.labels == label)[:40]):
            folder = root / ("north", "south")[i % 2] / source.class_names[label]
            folder.mkdir(parents=True, exist_ok=True)
            source.images.open(int(index)).save(folder / f"{i}.{'jpg' if i % 4 < 2 else 'png'}")
    return root


@pytest.mark.parametrize("layout", ["sites", "classes"])
def test_a_folder_trains_and_learns(
    fedclip: Command, clothing: Path, tmp_path: Path, layout: str
) -> None:
    config = tmp_path / "mine.yaml"
    path = clothing if layout == "sites" else clothing / "north"
    config.write_text(CONFIG.replace("PATH", str(path)))
    code, _, err = fedclip("run", config, "--output", tmp_path / "run")
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy"] >= 0.7
    assert summary["bad_images"] == 0
    partition = json.loads((tmp_path / "run" / "partition.json").read_text())
    names = [client["client_id"] for client in partition["clients"]]
    assert names == (["north", "south"] if layout == "sites" else ["client-00", "client-01"])
    assert partition["class_names"] == ["bag", "sneaker", "trousers"]
    photo = next((path if layout == "classes" else path / "south").joinpath("bag").iterdir())
    code, out, err = fedclip("predict", tmp_path / "run", photo, "--json")
    assert code == 0, err
    assert json.loads(out)[0]["label"] in partition["class_names"]


def test_the_tutorial_on_photographs_gives_the_answers_that_it_says(
    fedclip: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs/tutorial-your-images.md").read_text("utf-8")
    makes_them, sets_aside, _ = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(makes_them, "page", "exec"), {})
    for words in (
        ["init", "--data", "photos", "-o", "photos.yaml"],
        ["run", "photos.yaml", "--output", "runs/photos"],
    ):
        code, _, err = fedclip(*words)
        assert code == 0, err
    summary = json.loads(Path("runs/photos/summary.json").read_text())
    assert (summary["clients"], summary["rounds"]) == (5, 10)
    assert 0.6 <= summary["zero_shot_accuracy"] <= 0.8
    assert summary["accuracy"] >= 0.8
    assert Path("runs/photos/adapter_best").is_dir()
    exec(compile(sets_aside, "page", "exec"), {})
    code, out, err = fedclip("predict", "runs/photos", "unseen", "--json")
    assert code == 0, err
    answers = [(Path(row["image"]).name, row["label"]) for row in json.loads(out)]
    assert len(answers) == summary["test_examples"]
    right = sum(name.startswith(label) for name, label in answers)
    assert right == round(summary["accuracy"] * len(answers))
    places = [one["place"] for one in json.loads(
        Path("runs/photos/predictions.json").read_text())[""]["samples"]]  # fmt: skip
    assert {place.replace("/", "-") for place in places} <= {name for name, _ in answers}
