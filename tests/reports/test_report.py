"""The page of a run: what is in it, that it is sound HTML, and that no name is markup in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from pydantic import ValidationError

from fedclip.config.loading import config_from_dict
from fedclip.reports.comparison import Cells
from fedclip.reports.report.charts import lines_chart
from fedclip.reports.report.compare import bench_page, compare_page
from fedclip.reports.report.record import (
    LastPredictions,
    Layer,
    Partition,
    RoundLine,
    RunRecord,
    Sample,
    Summary,
    TimeLine,
)
from fedclip.reports.report.sections import about, results, run_page

pytestmark = pytest.mark.usefixtures("pixels")

NASTY = "<img src=x onerror=alert(1)>\"'&</td>{{7*7}}$x^2$\u202e"
VOID = {"meta", "img", "br", "link"}
PIXEL = "data:image/png;base64,iVBORw0KGgo="


class Page(HTMLParser):
    """Tags in order; fails where they are not properly nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())

    def attributes(self, name: str) -> list[str | None]:
        return [own[name] for _, own in self.tags if name in own]


def record(name: str = "run-1", **changes: Any) -> RunRecord:
    config = config_from_dict({"federation": {"rounds": 2, "num_clients": 2}})
    first = {"accuracy": 0.5, "zero_shot_accuracy": 0.5, "test_loss": 1.0}
    rounds = [
        RoundLine(server_round=0, **first, accuracy_by_client={NASTY: 0.25, "b": 0.75}),
        RoundLine(
            server_round=1, loss=0.7, bytes_up=2_000_000, bytes_down=1_000_000, accuracy=0.75,
            accuracy_by_client={NASTY: 0.5, "b": 0.5}, epsilon=1.5,
            left_out=[{"client": NASTY, "reason": NASTY}],
        ),
    ]  # fmt: skip
    sites = [
        {"client_id": NASTY, "train": {"num_examples": 5, "by_class": [5, 0]}},
        {"client_id": "b", "train": {"num_examples": 4, "by_class": [1, 3]}},
    ]
    tested = LastPredictions(
        class_names=[NASTY, "cat"],
        confusion=[(0, 0, 7), (0, 1, 2), (1, 1, 1)],
        samples=[Sample(image=PIXEL, label=0, predicted=1, confidence=0.9, place=NASTY)],
    )
    whole: dict[str, Any] = {
        "name": name,
        "config": config.model_dump(mode="json"),
        "config_text": f"seed: 0 # {NASTY}",
        "rounds": rounds,
        "times": [TimeLine(server_round=0, seconds=3.0, training_seconds=0)],
        "partitions": {"": Partition(class_names=[NASTY, "cat"], clients=sites)},
        "tested": {NASTY: tested},
        "layers": [Layer("vision_model.encoder.layers.0.self_attn.q_proj", 4, 0.5),
                   Layer("visual_projection", 2, 0.25)],
    }  # fmt: skip
    return RunRecord(**whole | changes)


def test_pages_are_sound_and_names_are_no_markup() -> None:
    table = Cells(NASTY, ["arm", NASTY], [[NASTY, "1"]])
    several = compare_page([record(NASTY), record("b")])
    for text in (run_page(record(NASTY)), several, bench_page(NASTY, [table], {})):
        page = Page(text)
        assert "<img src=x" not in text
        assert "{{7*7}}" in text
        assert "\u202e" not in text
        assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "link")]
        assert not [name for _, own in page.tags for name in own if name.startswith("on")]
        # Nothing is fetched: no address outside the page.
        for address in (*page.attributes("src"), *page.attributes("href")):
            assert str(address).startswith(("data:image/", "#"))
        links = [v for v in page.attributes("xlink:href") if not str(v).startswith("#")]
        assert links == []
        assert "default-src 'none'" in str(page.attributes("content"))


def test_a_chart_of_one_round_counts_in_whole_rounds() -> None:
    chart = lines_chart("Loss by round", "loss (nats)", {"training": [(1, 0.5)]})
    words = {word.strip() for word in re.findall(r"<text[^>]*>([^<]*)</text>", chart)}
    assert {"1", "round", "training"} <= words
    assert not words & {"0.98", "1.00", "1.02"}
    assert "#0102" not in chart  # the stand-ins of the page's colours


def test_charts_say_what_they_are() -> None:
    page = Page(run_page(record()))
    drawn = [own for tag, own in page.tags if tag == "svg"]
    assert [own["role"] for own in drawn] == ["img"] * 4
    titles = [str(own["aria-label"]) for own in drawn]
    assert titles == ["Accuracy by round, at the end 0.750", "Loss by round",
                      "Epsilon spent by round", "Time by round"]  # fmt: skip
    words = "\n".join(page.words)
    for told in ("accuracy (share that is right)", "loss (nats)", "seconds", "zero-shot", "round"):
        assert told in words
    # Names in the pictures are of one picture each.
    names = [str(own["id"]) for _, own in page.tags if "id" in own]
    assert len(names) == len(set(names))


def test_figures_by_site_and_class() -> None:
    words = Page(run_page(record())).words
    assert "+0.250" in words
    assert "\N{MINUS SIGN}0.250" in words  # b went from 0.75 to 0.5
    assert "2.0 MB" in words
    assert "0.500 (r 4)" in words
    found = words.index("vision 0")
    assert words[found + 1] == "0.500 (r 4)"
    rows = words[next(i for i, w in enumerate(words) if w.startswith("Confusion matrix")) :]
    assert [w for w in rows if w in ("7", "2", "1", "·")][:4] == ["7", "2", "·", "1"]


def test_many_classes_become_a_list_of_mistakes() -> None:
    names = [f"class {n}" for n in range(30)]
    tested = LastPredictions(class_names=names, confusion=[(0, 1, 3), (2, 2, 50), (4, 5, 9)])
    sites = [{"client_id": "a", "train": {"num_examples": 3, "by_class": [3] + [0] * 29}}]
    shown = record(
        tested={"": tested}, partitions={"": Partition(class_names=names, clients=sites)}
    )
    words = Page(run_page(shown)).words
    start = next(i for i, w in enumerate(words) if w.startswith("The most frequent mistakes"))
    assert "of 12 in all" in words[start]
    cells = [w for w in words[start + 1 :] if w]
    assert cells[3:9] == ["class 4", "class 5", "9", "class 0", "class 1", "3"]


def test_runs_side_by_side_show_gains_over_training_alone_and_what_differs() -> None:
    alone = config_from_dict({"federation": {"strategy": "local"}, "seed": 7})
    last = RoundLine(server_round=1, accuracy=0.5, accuracy_by_client={"b": 0.125})
    local = record("alone", config=alone.model_dump(mode="json"), rounds=[last])
    words = Page(compare_page([record(), local])).words
    assert "Gain of each site over training alone (B)" in words
    assert "+0.375" in words
    assert "federation.strategy" in words
    assert "model.model_name" not in words
    assert '"local"' in words


def test_a_page_of_thousands_of_rounds_and_sites_stays_small() -> None:
    sites = {f"site-{n}": 0.5 for n in range(2000)}
    rounds = [RoundLine(server_round=n, accuracy=0.5, loss=1.0) for n in range(1499)]
    rounds.append(RoundLine(server_round=1499, accuracy_by_client=sites))
    times = [TimeLine(server_round=n, seconds=1.0, training_seconds=0.5) for n in range(1500)]
    assert len(run_page(record(rounds=rounds, times=times)).encode()) < 1_000_000


def test_what_a_file_says_is_checked() -> None:
    with pytest.raises(ValidationError, match="a number of a class"):
        LastPredictions(class_names=["a"], confusion=[(0, 1, 3)])
    for image in ("javascript:alert(1)", "https://x.org/a.png", PIXEL + '" onload="x'):
        with pytest.raises(ValidationError):
            Sample(image=image, label=0, predicted=0, confidence=0.5)
    with pytest.raises(ValidationError):
        RoundLine(server_round=0, accuracy="high")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        Summary(rounds=1)  # type: ignore[call-arg]


def test_an_unfinished_run_says_how_far_it_came() -> None:
    assert "1 of 2 rounds so far" in run_page(record())


def ended(**changes: object) -> Summary:
    found: dict[str, Any] = {
        "rounds": 1, "zero_shot_accuracy": 0.5, "accuracy": 1.0, "trainable_parameters": 8,
        "bytes_up_per_client_round": 1.0, "bytes_down_per_client_round": 1.0, "engine": "batched",
        "precision": "fp32", "versions": {}, "worst_class": {"name": "boots", "recall": 1.0},
        "best": {"server_round": 5, "validation_accuracy": 0.875, "accuracy": 0.96875},
    }  # fmt: skip
    return Summary.model_validate(found | changes)


def test_the_tiles_say_of_what_the_figures_are() -> None:
    rounds = [RoundLine(server_round=1, accuracy=1.0, test_examples=43)]
    run = record(rounds=rounds, summary=ended())
    told = dict(results(run))
    assert told["accuracy"] == "1.000"
    assert told["95 % interval"] == "0.918 to 1.000 (43 images)"
    assert told["best round by validation"] == "round 5"
    assert told["validation accuracy of that round"] == "0.875"
    assert told["test accuracy of that round"] == "0.969"
    assert told["recall of the worst class"] == "1.000 (of every class)"
    assert "43 test images are little to go by" in run_page(run)
    worse = record(rounds=rounds, summary=ended(accuracy=1.5))
    assert dict(results(worse))["recall of the worst class"] == "1.000 (boots)"
    many = [RoundLine(server_round=1, accuracy=1.0, test_examples=100)]
    assert "little to go by" not in run_page(record(rounds=many))


def test_without_a_mistake_the_page_says_so_and_names_the_files() -> None:
    right = LastPredictions(
        class_names=["a", "b"],
        confusion=[(0, 0, 7), (1, 1, 1)],
        samples=[Sample(image=PIXEL, label=0, predicted=0, confidence=0.9, place="a/<7>.jpg")],
    )
    page = run_page(record(tested={"": right}))
    assert "No mistakes on the test images." in page
    assert "a/&lt;7&gt;.jpg" in page
    assert "No mistakes" not in run_page(record())


def test_the_page_names_the_model_and_the_folder() -> None:
    own = {"data": {"name": "imagefolder", "path": "/home/me/photos"}}
    run = record(config=config_from_dict(own).model_dump(mode="json"))
    assert about(run).startswith("model tiny on photos (imagefolder), strategy fedavg")
