"""The command line: warnings, tables, JSON, help."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from fedclip.cli.console import show
from fedclip.errors import FedclipWarning
from tests.conftest import Command
from tests.support.cli import Experiment


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Experiment:
    return Experiment.put_in_place(monkeypatch)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("federation:\n  rounds: 3\n")
    return path


def test_advice_is_one_line(fedclip: Command, config: Path) -> None:
    code, out, err = fedclip("validate", config, "model.lora.lora_alpha=64")
    assert code == 0
    assert out == f"{config}: valid\n"
    assert err == (
        "warning: model.lora.lora_alpha is usually 1 to 2 times r (8 to 16), got 64 "
        "(command line: model.lora.lora_alpha=64)\n"
        "looked at keys only, not at images, the model or addresses; --data opens the images\n"
    )


def test_other_warnings_stay_as_they_are(
    fedclip: Command, experiment: Experiment, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(folder: Path, **options: object) -> dict[str, Any]:
        warnings.warn("ours", FedclipWarning, stacklevel=2)
        warnings.warn("ours", FedclipWarning, stacklevel=2)
        return {}

    monkeypatch.setattr(experiment, "evaluate", evaluate)
    assert fedclip("evaluate", "r")[2] == "warning: ours\n" * 2


def test_validate_reports_every_file(fedclip: Command, config: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("seed: x\n")
    code, out, err = fedclip("validate", bad, config, tmp_path / "none.yaml")
    assert code == 2
    assert out == f"{config}: valid\n"
    assert f"seed must be a whole number >= 0, got the text 'x' ({bad}, line 1)" in err
    assert "there is no configuration file" in err


def test_info_as_a_table_and_as_json(
    fedclip: Command, experiment: Experiment, config: Path
) -> None:
    code, out, _ = fedclip("info", config, "seed=1")
    assert code == 0
    assert experiment.calls == [("info", config, ["seed=1"])]
    table, end = out.split("\n\n")
    rows = dict(line.split("  ", 1) for line in table.splitlines())
    assert {key: value.strip() for key, value in rows.items()} == {
        "base parameters": "151,277,313",
        "up per client round": "2.359 MB",
        "times less traffic": "256.5",
        "data": "[b]digits",
        "strategy": "fedavg",
        "engine": "batched",
        "clients": "3",
        "seconds": "1.5",
    }
    assert end == "accuracy 0.900 (zero-shot 0.400) after 3 rounds\n"
    assert json.loads(fedclip("info", config, "--json")[1])["base_parameters"] == 151277313


def test_a_run_cannot_be_changed_by_info(
    fedclip: Command, experiment: Experiment, tmp_path: Path
) -> None:
    assert fedclip("info", tmp_path, "seed=1")[0] == 2
    assert fedclip("info", tmp_path)[0] == 0


def test_evaluate(fedclip: Command, experiment: Experiment) -> None:
    assert "accuracy  0.500" in fedclip("evaluate", "r")[1]


@pytest.mark.parametrize(
    ("count", "told"),
    [(131_072, "0.131 MB"), (151_277_313, "151.3 MB"), (23_168_901_120, "23,169 MB")],
)
def test_megabytes_have_no_more_digits_than_matter(
    capsys: pytest.CaptureFixture[str], count: int, told: str
) -> None:
    show({"free_memory_bytes": count}, as_json=False)
    assert capsys.readouterr().out.split("  ")[1].strip() == told


def test_help_and_version(fedclip: Command) -> None:
    for command in ("run", "validate", "info", "evaluate", "predict", "export", "merge"):
        assert command in fedclip("--help")[1]
        assert fedclip(command, "--help")[0] == 0
    assert fedclip("--version")[1].startswith("fedclip 0.")
    assert fedclip()[0] == 2


def test_a_closed_pipe_is_no_traceback(config: Path) -> None:
    code = (
        "import sys; sys.argv = ['fedclip', 'validate'] + [sys.argv[1]] * 2000;"
        "from fedclip.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
