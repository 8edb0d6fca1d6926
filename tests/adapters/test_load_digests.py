"""The digests beside an adapter are compared at every door."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import fedclip
from fedclip.adapters.card import run_card
from fedclip.adapters.export import export
from fedclip.adapters.inspect import evaluate
from fedclip.adapters.load import load_run_model
from fedclip.adapters.merge import read_adapters
from fedclip.errors import DamagedFile, UsageError
from fedclip.models.adapter_folder import read_adapter
from tests.support.small import SMALL

CONFIG: dict[str, Any] = {
    "model": {"model_name": SMALL, "head": "linear", "lora": {"r": 2, "last_layers": 1}},
    "data": {"name": "digits", "max_train_examples": 40},
    "federation": {"rounds": 1, "num_clients": 2},
    "evaluation": {"max_examples": 10},
}
FILES = ("adapter_model.safetensors", "head.safetensors", "adapter_config.json", "fedclip.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fedclip.run(CONFIG, output=tmp_path_factory.mktemp("finished") / "run").folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_noticed(run: Path, name: str) -> None:
    """Anywhere in a file: tensors, header, metadata, configuration, notes."""
    path, chance = run / "adapter" / name, random.Random(name)
    raw = path.read_bytes()
    for place in [*range(8, 120), *(chance.randrange(len(raw)) for _ in range(200))]:
        data = bytearray(raw)
        data[place] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        with pytest.raises(UsageError):
            read_adapter(run / "adapter")
    path.write_bytes(raw)
    read_adapter(run / "adapter")


DOORS: dict[str, Callable[[Path], object]] = {
    "load": load_run_model,
    "evaluate": evaluate,
    "export": lambda run: export(run, "peft", run.parent / "out"),
    "export the folder": lambda run: export(run / "adapter", "merged", run.parent / "out"),
    "merge": lambda run: read_adapters([run, run]),
    "card": run_card,
}


@pytest.mark.parametrize("door", DOORS)
def test_another_scale_is_noticed_at_every_door(run: Path, door: str) -> None:
    path = run / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] + 1}))
    with pytest.raises(DamagedFile, match=r"adapter_config\.json changed since the digest"):
        DOORS[door](run)


@pytest.mark.parametrize("door", ["load", "evaluate", "export", "merge", "card"])
def test_the_adapter_of_another_run_is_noticed(run: Path, tmp_path: Path, door: str) -> None:
    model = load_run_model(run)
    model.set_parameters({name: t + 1 for name, t in model.get_parameters().items()})
    model.save_adapter(tmp_path / "other")
    read_adapter(tmp_path / "other")
    shutil.rmtree(run / "adapter")
    shutil.copytree(tmp_path / "other", run / "adapter")
    with pytest.raises(UsageError, match="is not the adapter that the run saved there"):
        DOORS[door](run)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"class_names": 5}, "class_names"),
        ({"class_names": None}, "class_names"),
        ({"class_names": "abc"}, "class_names"),
        ({"class_names": [1]}, "class_names.0"),
        ({"templates": {"a": 1}}, "templates"),
        ({"head": "other"}, "head"),
        ({"base_model": 3}, "base_model"),
        ({"base_sha256": []}, "base_sha256"),
        ({"own_ranks": "yes"}, "own_ranks"),
        ({"auto_map": "x"}, "auto_map"),
    ],
)
def test_fields_of_wrong_kinds_are_named(run: Path, change: dict[str, Any], key: str) -> None:
    path = run / "adapter" / "fedclip.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=rf"fedclip\.json: {key}: "):
        load_run_model(run)


@pytest.mark.parametrize("name", ["fedclip.json", "adapter_config.json"])
@pytest.mark.parametrize("text", [b"[" * 100000, b"[]", b"\xff", b"", b'{"a": NaN}'])
def test_text_that_is_no_json_object_is_named(run: Path, name: str, text: bytes) -> None:
    (run / "adapter" / name).write_bytes(text)
    with pytest.raises(UsageError, match=rf"{name} is damaged"):
        read_adapter(run / "adapter")


def test_folders_without_digests_are_read(run: Path) -> None:
    """One of an older version, whose notes have the tensors' digest only, and a plain PEFT one."""
    adapter = run / "adapter"
    about = json.loads((adapter / "fedclip.json").read_text())
    old = {k: v for k, v in about.items() if k not in ("config_sha256", "notes_sha256")}
    (adapter / "fedclip.json").write_text(json.dumps(old))
    read_adapter(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, adapter / "adapter_model.safetensors")
    with pytest.raises(DamagedFile):
        read_adapter(adapter)
    (adapter / "fedclip.json").unlink()
    read_adapter(adapter)
