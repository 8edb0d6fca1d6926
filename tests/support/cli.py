"""What the tests of the command line share."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fedclip.config import Config
from fedclip.experiment.folder import RunFolder


class Experiment(types.ModuleType):
    """Stands in for `experiment.run` and `adapters.inspect`, and records how it was called."""

    def __init__(self) -> None:
        super().__init__("fedclip.experiment.run")
        self.calls: list[tuple[Any, ...]] = []
        self.failure: BaseException | None = None

    def run(self, config: Config, *, output: Path, listener: Any) -> Any:
        self.calls.append(("run", config, output))
        return self._work(output)

    def resume(self, folder: Path, *, listener: Any) -> Any:
        self.calls.append(("resume", folder))
        return self._work(folder)

    def info(self, target: Path, overrides: list[str], best: bool = False) -> dict[str, Any]:
        self.calls.append(("info", target, overrides))
        return {
            "base_parameters": 151277313,
            "bytes_up_per_client_round": 2359296,
            "times_less_traffic": 256.48,
            "summary": {
                "data": "[b]digits",
                "strategy": "fedavg",
                "engine": "batched",
                "clients": 3,
                "rounds": 3,
                "seconds": 1.5,
                "accuracy": 0.9,
                "zero_shot_accuracy": 0.4,
            },
        }

    def evaluate(
        self, folder: Path, listener: object = None, detail: bool = False, best: bool = False
    ) -> dict[str, Any]:
        self.calls.append(("evaluate", folder))
        return {"accuracy": 0.5}

    def _work(self, folder: Path) -> Any:
        if not Path(folder).exists():
            RunFolder.create(folder, "seed: 0\n")
        if self.failure is not None:
            raise self.failure
        summary = {"accuracy": 0.9, "zero_shot_accuracy": 0.4, "rounds": 3}
        return types.SimpleNamespace(folder=folder, summary=summary)

    @classmethod
    def put_in_place(cls, monkeypatch: pytest.MonkeyPatch) -> Experiment:
        fake = cls()
        for name in ("experiment.run", "adapters.inspect"):
            monkeypatch.setitem(sys.modules, f"fedclip.{name}", fake)
            monkeypatch.setattr(f"fedclip.{name}", fake, raising=False)
        monkeypatch.setattr("fedclip.run", fake.run, raising=False)
        monkeypatch.setattr("fedclip.resume", fake.resume, raising=False)
        measure = lambda *args, **options: fake.evaluate(*args, **options)  # noqa: E731
        monkeypatch.setattr("fedclip.evaluate", measure, raising=False)
        return fake
