"""What several test files share."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from fedclip.cli import main as cli
from tests.runs_help import CONFIG

# Files that take seconds: `make quick` leaves them out.
SLOW = """
adapter_alone adapter_digests bad_input bench bench_tuning best_round captions catalog
centralised coordinator_run data_federation data_fixed_test data_holdout detail docs doors
engines_agree engines_side_by_side engines_static engines_strategies examples experiment
export extending forgetting fuzz guide hostile_sites inspection kills linear_probe
listeners machines merge model_folders models_adapter models_clip models_layers
models_lora patience photographs pictures privacy_accounting privacy_engines privacy_runs
processes resume resume_strategies robust run_checks serve serve_process strategies_peft
supervised tasks_run tiny_model your_images
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of files that take long."""
    files = {f"test_{name}.py" for name in SLOW.split()}
    for item in items:
        if item.path.name in files:
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

    config = CONFIG | {"federation": CONFIG["federation"] | {"rounds": 1}}
    return package.run(config, output=tmp_path_factory.mktemp("finished") / "run").folder
