"""A run that was stopped goes on to the same bytes, whatever the strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fedclip
from fedclip.catalog import STRATEGIES
from fedclip.experiment.run import resume
from fedclip.records import RunState
from tests.support.runs import StopAfter
from tests.support.small import SMALL
from tests.support.strategies import rounds

# Whose states are made of views, such as transposed ones.
CASES: dict[str, dict[str, Any]] = {
    "fedsvd": {"strategy": "fedsvd"},
    "fed_sb": {"strategy": "fed_sb"},
    "dynamic": {"strategy": "flexlora", "dynamic_ranks": {"enabled": True, "warmup": 0}},
}


def config(federation: dict[str, Any]) -> dict[str, Any]:
    """Two rounds of two clients; ranks and sides are large enough for a BLAS to have choices."""
    return {
        "model": {"model_name": SMALL, "lora": {"r": 8, "last_layers": 1}},
        "client": {"learning_rate": 0.01},
        "data": {"name": "digits", "max_train_examples": 48, "batch_size": 8},
        "federation": {"rounds": 2, "num_clients": 2, **federation},
        "evaluation": {"every": 2},
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_state_lies_in_memory_as_the_checkpoint_gives_it_back(strategy: str) -> None:
    results, _ = rounds(strategy, count=3)
    for name, tensor in results[-1].state.flat().items():
        assert tensor.is_contiguous(), name


def test_the_states_of_groups_are_laid_out_too() -> None:
    view = {"w": torch.ones(2, 3).T}
    inner = RunState(view, shift=view, server=view, private={"a": view})
    flat = RunState(view, groups={"g": inner}, member_of={"a": "g"}).laid_out().flat()
    assert sum(tensor.numel() == 6 for tensor in flat.values()) == 5
    assert all(tensor.is_contiguous() for tensor in flat.values())


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_with_the_same_bytes(case: str, tmp_path: Path) -> None:
    asked = config(CASES[case])
    whole = fedclip.run(asked, output=tmp_path / "whole").folder
    with pytest.raises(KeyboardInterrupt):
        fedclip.run(asked, output=tmp_path / "cut", listener=StopAfter(1))
    again = resume(tmp_path / "cut").folder
    for name in ("metrics.jsonl", "checkpoint.safetensors", "adapter/adapter_model.safetensors"):
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name
