"""What a person sees: figures in a line, tables, plots."""

import io

import pytest
from PIL import Image
from rich.console import Console

from fedclip.records import ClientReport
from fedclip.reports.curves import curves, curves_png
from fedclip.reports.progress import LiveProgress, PlainProgress, make_progress
from fedclip.reports.tables import partition_table

RECORD = {
    "server_round": 1,
    "loss": 1.5,
    "accuracy": 0.25,
    "client_accuracy": {"min": 0.1, "max": 0.4},
}


def test_plain_progress_prints_a_line_per_round():
    text = io.StringIO()
    progress = PlainProgress(Console(file=text, width=120))
    with progress:
        progress.round({"server_round": 0, "accuracy": 0.2})
        progress.rounds(0, 2, 3)
        progress.round(RECORD)
    before, first = text.getvalue().splitlines()
    assert before == "before training  accuracy 0.200"
    assert first.startswith(
        "round 1/2  loss 1.500  accuracy 0.250  clients 0.10-0.40  0 s, 0 s left"
    )


def test_live_progress_shows_rounds_and_clients():
    text = io.StringIO()
    progress = LiveProgress(Console(file=text, width=120, force_terminal=True))
    with progress:
        progress.images(5, 10)
        progress.rounds(0, 1, 2)
        progress.client(ClientReport("site-7", 10, 0.5, 1, 0.1))
        progress._progress.refresh()
        progress.round({"server_round": 0, "accuracy": 0.2})
        progress.round(RECORD)
    assert "site-7: loss 0.500" in text.getvalue()
    assert "before training  accuracy 0.200" in text.getvalue()  # lines of their own, which stay
    assert "round 1/1  loss 1.500  accuracy 0.250" in text.getvalue()


def test_the_clients_bar_moves_by_steps_and_never_back():
    progress = LiveProgress(Console(file=io.StringIO(), width=120, force_terminal=True))
    with progress:
        progress.rounds(0, 2, 4)
        bar = progress._progress.tasks[progress._tasks["clients"]]
        progress.steps(5, 10)
        assert bar.completed == 2
        progress.client(ClientReport("a", 10, 0.5, 1, 0.1))
        assert bar.completed == 2
        progress.steps(10, 10)
        assert bar.completed == 4
        progress.round(RECORD)
        assert (bar.completed, bar.visible) == (0, True)
        progress.steps(1, 10)
        assert bar.completed == 0.4


def test_the_display_suits_the_console():
    assert type(make_progress(Console(file=io.StringIO()))) is PlainProgress
    assert type(make_progress(Console(file=io.StringIO(), force_terminal=True))) is LiveProgress


def test_the_partition_table_shows_counts_and_folds_many_classes():
    def render(table):
        text = io.StringIO()
        Console(file=text, width=100).print(table)
        return text.getvalue()

    few = render(partition_table(["cat", "dog"], {"a": [3, 0], "b": [1, 2]}))
    assert [line.split() for line in few.split("\n")[-4:-2]] == [
        ["a", "3", ".", "3"],
        ["b", "1", "2", "3"],
    ]
    many = render(partition_table([str(i) for i in range(40)], {"a": [5, 1] + [0] * 38}))
    assert many.split("\n")[-3].split() == ["a", "2", "5", "1", "6"]


@pytest.mark.usefixtures("pixels")
def test_a_line_at_1_lies_below_the_frame_and_the_legend_below_the_lines():
    both = {"mean": 1.0, "min": 0.5, "max": 1.0}
    metrics = [{"server_round": i, "accuracy": 1.0, "client_accuracy": both} for i in range(3)]
    figure = curves(metrics, zero_shot=0.5)
    figure.canvas.draw()
    axes = figure.axes[1]
    assert axes.get_ylim()[1] > 1.0
    frame, legend = axes.get_window_extent(), axes.get_legend().get_window_extent()
    assert legend.y1 < frame.y0
    assert figure.bbox.x0 < legend.x0 < legend.x1 < figure.bbox.x1
    assert legend.y0 > figure.bbox.y0


@pytest.mark.usefixtures("pixels")
def test_the_curves_are_an_image_also_after_a_single_round():
    for metrics in ([RECORD], [{"server_round": 0, "accuracy": None, "client_accuracy": None}]):
        image = Image.open(io.BytesIO(curves_png(metrics, zero_shot=0.2)))
        assert image.format == "PNG"
        assert image.width > 800
