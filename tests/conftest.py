"""What several test files share."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from fedclip import cli

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
