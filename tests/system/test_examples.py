"""The examples run as they stand, and Flower's FedAvg agrees with ours."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import fedclip
from fedclip.adapters import merge_search as weight_search
from fedclip.federated.client import local_train
from fedclip.lora.merge_methods import METHODS
from tests.support.algebra import weighted_mean

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, folder: Path) -> str:
    environment = os.environ | {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fedavg_by_hand_learns(tmp_path: Path) -> None:
    accuracies = re.findall(r"accuracy (\d\.\d+)", run_example("fedavg_by_hand.py", tmp_path))
    assert len(accuracies) == 5
    assert float(accuracies[-1]) > float(accuracies[0]) + 0.03


def test_merge_two_merges_in_every_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands but for its sizes."""
    train = fedclip.run

    def train_little(config: dict[str, Any], output: Path) -> Any:
        data = config["data"] | {"name": "digits", "max_train_examples": 60}
        return train(
            config | {"data": data, "federation": {"rounds": 1, "num_clients": 2}}, output=output
        )

    monkeypatch.setattr(fedclip, "run", train_little)
    monkeypatch.setattr(weight_search, "_EVALUATIONS", 1)
    runpy.run_path(str(EXAMPLES / "merge_two.py"))
    lines = re.findall(r"(.+?) +digits \d\.\d+  icons \d\.\d+", capsys.readouterr().out)
    assert lines == ["digits alone", "icons alone", *METHODS, "svd, searched"]


@pytest.fixture
def flower_stock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The Flower example as a module, on two small sites of different size."""
    pytest.importorskip("flwr.serverapp", reason="Flower is the extra 'flower'")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    spec = importlib.util.spec_from_file_location("flower_stock", EXAMPLES / "flower_stock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    all_of_it = module.load_site

    def some_of_it(model: object, context: object) -> tuple[np.ndarray, np.ndarray]:
        pixels, labels = all_of_it(model, context)
        count = (96, 32)[context.node_config["partition-id"]]  # type: ignore[attr-defined]
        return pixels[:count], labels[:count]

    monkeypatch.setattr(module, "load_site", some_of_it)
    return module


def test_flowers_fedavg_agrees_with_ours(flower_stock: ModuleType) -> None:
    grid = flower_stock.InProcessGrid(sites=2)
    theirs = flower_stock.run(grid, rounds=1).to_torch_state_dict()

    model = flower_stock.build_model()
    start = model.get_parameters()
    states = []
    for part, context in enumerate(grid.contexts.values()):
        pixels, labels = flower_stock.load_site(model, context)
        model.set_parameters(start)
        local_train(
            model,
            pixels,
            labels,
            np.arange(len(labels)),
            flower_stock.SETTINGS,
            seed=1000 + part,
            device=torch.device("cpu"),
        )
        states.append(model.get_parameters())
    stacked = {name: torch.stack([state[name] for state in states]) for name in start}
    ours = weighted_mean(stacked, torch.tensor([96.0, 32.0]))

    assert list(theirs) == list(ours)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-6, atol=1e-7)
        assert not torch.equal(value, start[name])
    model.set_parameters(theirs)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_plain_peft_trains_what_fedclip_trains(tmp_path: Path) -> None:
    """transformers, PEFT and torch alone, on the same split, with draws of their own."""
    spec = importlib.util.spec_from_file_location("plain_peft", EXAMPLES / "plain_peft.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    config = {
        "model": {"lora": {"target_modules": {"vision_encoder": ["q_proj", "v_proj"]}}},
        "client": {"learning_rate": 0.01},
        "optimizer": {"schedule": "cosine"},
        "data": {"name": "digits", "max_train_examples": 240, "test_seed": 0},
        "federation": {"rounds": 2, "num_clients": 3},
        "evaluation": {"every": 2},
    }
    summary = fedclip.run(config, output=tmp_path / "run").summary
    accuracy = example.main(tmp_path / "run")
    assert accuracy[0] == pytest.approx(summary["zero_shot_accuracy"], abs=1e-6)
    assert accuracy[-1] > accuracy[0] + 0.04
    assert accuracy[-1] == pytest.approx(summary["accuracy"], abs=0.04)
    assert not re.search(r"^(import|from) fedclip", (EXAMPLES / "plain_peft.py").read_text(), re.M)


def test_the_quickstart_in_plain_peft_agrees_over_three_seeds() -> None:
    """What `benchmarks/replication.py` found."""
    file = EXAMPLES.parent / "benchmarks" / "results" / "replication.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    runs = result["details"]["runs"]
    assert [run["seed"] for run in runs] == [0, 1, 2]
    apart = [run["fedclip"] - run["plain_peft"] for run in runs]
    assert abs(sum(apart) / 3) < 0.01
    assert result["figures"]["difference"] == pytest.approx(sum(apart) / 3)
    for run in runs:
        assert run["zero_shot_plain_peft"] == pytest.approx(run["zero_shot_fedclip"], abs=1e-6)
