"""What several test files share."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from fedclip.cli import main as cli
from tests.support.runs import CONFIG

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Files that take seconds, by room: `make quick` leaves them out.
SLOW = {
    "": "catalog",
    "adapters": "card export inspect load load_digests merge predict python serve serve_process",
    "cli": "console start",
    "data": "cache fixed_test_set loading partition picture_sizes picture_types splits",
    "deploy": """
        coordinator_run flower_supervisor keys log masked_engine remote remote_hostile
        remote_masked site_consent site_privacy statement status
    """,
    "evaluation": "breakdown metrics unseen",
    "experiment": """
        audit bench bench_tuning build checkpoint early_stopping privacy run run_attacked
        run_masked run_report
    """,
    "federated": """
        engines_agree engines_private engines_sharded engines_static engines_strategies
        engines_threads privacy_accounting robust
    """,
    "models": """
        adapter_io clip linear_head lora_settings model_config peft_lora state tiny weight_delta
        wrapper
    """,
    "reports": "listener report trackers",
    "system": """
        bad_input best_round captions centralised docs doors examples extending fuzz guide kills
        notebook resume_strategies strategies_peft tasks your_images
    """,
}
TESTS = Path(__file__).parent
SLOW_FILES = {
    TESTS / room / f"test_{name}.py" for room, names in SLOW.items() for name in names.split()
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of files that take long."""
    if missing := [str(file) for file in SLOW_FILES if not file.is_file()]:
        raise pytest.UsageError(f"tests/conftest.py lists files that are not there: {missing}")
    for item in items:
        if item.path in SLOW_FILES:
            item.add_marker("slow")


# The same examples each time; `--hypothesis-profile=default` draws others.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fedclip(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Calls the command in this process; gives exit code, standard output, standard error."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedclip", *map(str, arguments)])
        with pytest.raises(SystemExit) as end, warnings.catch_warnings():
            cli.main()
        assert isinstance(end.value.code, int)
        out, err = capsys.readouterr()
        return end.value.code, out, err

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("FEDCLIP_DEBUG", raising=False)
    return call


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one round, to be left as it is."""
    import fedclip as package

    tiny = CONFIG["model"] | {"model_name": "random:tiny"}  # which can be exported
    config = CONFIG | {"model": tiny, "federation": CONFIG["federation"] | {"rounds": 1}}
    return package.run(config, output=tmp_path_factory.mktemp("finished") / "run").folder


@pytest.fixture(scope="session", autouse=True)
def draw() -> Iterator[Callable[..., None]]:
    """What takes a third of a small run and is no subject: drawing plots, waiting for the disk."""
    from matplotlib.figure import Figure

    draw = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", _described)
        patch.setattr("os.fsync", lambda descriptor: None)
        yield draw


def _described(figure: Figure, file: IO[Any] | str | Path, **how: object) -> None:
    """Writes what a plot shows, not its pixels."""
    if isinstance(file, str | Path):
        with Path(file).open("w" if Path(file).suffix == ".svg" else "wb") as opened:
            _described(figure, opened, **how)
        return
    if isinstance(file, io.TextIOBase):
        file.write('<svg width="1pt" height="1pt"></svg>')
        return
    shown = [
        (axes.get_title(), [line.get_xydata().tolist() for line in axes.get_lines()])
        for axes in figure.get_axes()
    ]
    file.write(b"\x89PNG\r\n\x1a\n" + repr((how, shown)).encode())


@pytest.fixture
def pixels(draw: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are drawn."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", draw)
