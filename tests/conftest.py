"""What several test files share."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from fedclip.cli import main as cli
from tests.runs_help import CONFIG

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
