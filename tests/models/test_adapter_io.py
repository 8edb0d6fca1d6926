"""Adapter folders: PEFT reads them, bytes repeat, misfits change nothing, writes are whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import CLIPModel

from fedclip import base_folder
from fedclip.errors import UsageError
from fedclip.models import whole_folder
from fedclip.models.clip import CLIPLoRAWrapper, adapter_sha256, create_clip_model
from fedclip.models.pretrained import load_base
from tests.support.models import NAMES, PROBE, shaken

BOTH = {"vision_encoder": ["q_proj", "fc1"], "text_encoder": ["v_proj"]}
FULL = {"lora": {"enabled": False}}


# PEFT asks transformers by a name that transformers calls deprecated.
quiet_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def trained(config: dict, shake: int = 0, **kwargs: Any) -> CLIPLoRAWrapper:
    model = create_clip_model(config, **kwargs)
    model.set_parameters(shaken(model, shake))
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@quiet_peft
@pytest.mark.parametrize("targets", [{"vision_encoder": ["q_proj", "out_proj"]}, BOTH])
def test_peft_gives_the_same_logits(tmp_path: Path, targets: dict[str, list[str]]) -> None:
    folder = tmp_path / "adapter"
    model = trained({"lora": {"r": 4, "target_modules": targets}}, class_names=NAMES)
    model.save_adapter(folder)
    pixels = torch.rand(4, 3, model.image_size, model.image_size)
    tokens = load_base("tiny").tokens
    input_ids = tokens.pad(tokens.encode([f"a photo of a {name}." for name in NAMES]))

    peft = PeftModel.from_pretrained(CLIPModel.from_pretrained(base_folder("tiny")), folder)
    with torch.no_grad():
        theirs = peft(input_ids=input_ids, pixel_values=pixels).logits_per_image
        ours = model(pixels)
        with model.zero_shot():
            zero_shot = model(pixels)
    largest = ours.abs().max()
    assert (theirs - ours).abs().max() <= 1e-5 * largest
    assert (zero_shot - ours).abs().max() > 1e-2 * largest


@quiet_peft
def test_a_folder_holds_what_peft_writes_and_a_card(tmp_path: Path) -> None:
    model = trained({"lora": {"r": 4}}, class_names=NAMES)
    model.save_adapter(tmp_path / "adapter")
    assert sorted(files(tmp_path / "adapter")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "fedclip.json",
    ]
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert adapter_sha256(state) == adapter_sha256(model.get_parameters())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.startswith('---\nbase_model: "tiny"\nlibrary_name: peft\n')
    assert "cat, dog, red car" in card
    assert str(Path.home()) not in card

    code = card.split("```python\n")[1].split("```")[0]
    scope: dict[str, object] = {}
    exec(code.replace("<this folder>", str(tmp_path / "adapter")), scope)
    assert isinstance(scope["model"], PeftModel)


@pytest.mark.parametrize("config", [{}, {"lora": {"target_modules": BOTH}}, FULL, PROBE])
def test_equal_adapters_give_equal_files(tmp_path: Path, config: dict) -> None:
    for name in ("one", "two"):
        trained(config, class_names=NAMES).save_adapter(tmp_path / name)
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize(
    "config",
    [
        {"lora": {"target_modules": BOTH}},
        {"head": "linear"},
        PROBE,
        FULL,
        FULL | {"head": "linear"},
    ],
)
def test_what_is_saved_is_loaded(tmp_path: Path, config: dict) -> None:
    model = trained(config, class_names=NAMES)
    model.save_adapter(tmp_path / "adapter")
    other = create_clip_model(config, class_names=NAMES, seed=1)
    other.load_adapter(tmp_path / "adapter")
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(other(pixels), model(pixels))
    head = (tmp_path / "adapter" / "head.safetensors").is_file()
    assert head == (model.head == "linear")


def test_classes_come_with_the_adapter_where_a_model_has_none(tmp_path: Path) -> None:
    templates = ["the {} icon"]
    trained({}, class_names=NAMES, templates=templates).save_adapter(tmp_path / "adapter")
    model = create_clip_model({})
    model.load_adapter(tmp_path / "adapter")
    assert (model.class_names, model.templates) == (tuple(NAMES), tuple(templates))
    other = create_clip_model({}, class_names=["ant", "bee"])
    other.load_adapter(tmp_path / "adapter")
    assert other.class_names == ("ant", "bee")


def test_a_plain_peft_adapter_is_read(tmp_path: Path) -> None:
    model = trained({"lora": {"r": 4}})
    model.save_adapter(tmp_path / "adapter")
    for name in ("fedclip.json", "README.md"):
        (tmp_path / "adapter" / name).unlink()
    other = create_clip_model({"lora": {"r": 4}})
    other.load_adapter(tmp_path / "adapter")
    assert adapter_sha256(other.get_parameters()) == adapter_sha256(model.get_parameters())


def test_a_moved_base_folder_is_the_same_base(tmp_path: Path) -> None:
    trained({}).save_adapter(tmp_path / "adapter")
    copy = shutil.copytree(base_folder("tiny"), tmp_path / "copy")
    create_clip_model({"model_name": str(copy)}).load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        ({"lora": {"r": 2}}, {"lora": {"r": 4}}, "has rank 2, the model rank 4"),
        ({"lora": {"lora_alpha": 8}}, {}, "has lora_alpha 8, the model lora_alpha 16"),
        ({"lora": {"target_modules": BOTH}}, {}, "target_modules"),
        ({"model_name": "random:tiny"}, {}, "made on random:tiny, this model is tiny"),
        (FULL | {"model_name": "random:tiny"}, FULL, "made on random:tiny, this model is tiny"),
        ({"head": "linear"}, {}, "head.bias"),
        (FULL, {}, "holds a full model, this model trains a LoRA adapter"),
        (PROBE, {"head": "linear"}, "holds a linear head alone, this model trains a LoRA adapter"),
        (FULL | {"head": "linear"}, PROBE, "holds a full model, this model trains a linear head"),
        ({}, FULL, "holds a LoRA adapter, this model trains a full model"),
    ],
)
def test_a_misfit_names_both_and_changes_nothing(
    tmp_path: Path, saved: dict, loaded: dict, message: str
) -> None:
    trained(saved, class_names=NAMES, seed=7).save_adapter(tmp_path / "adapter")
    model = create_clip_model(loaded)
    before = adapter_sha256(model.get_parameters())
    with pytest.raises(UsageError, match=message):
        model.load_adapter(tmp_path / "adapter")
    assert adapter_sha256(model.get_parameters()) == before
    assert model.class_names == ()


def test_other_weights_under_the_same_name(tmp_path: Path) -> None:
    random = {"model_name": "random:tiny"}
    trained(random).save_adapter(tmp_path / "adapter")
    create_clip_model(random).load_adapter(tmp_path / "adapter")
    with pytest.raises(UsageError, match="other weights of random:tiny"):
        create_clip_model(random, seed=1).load_adapter(tmp_path / "adapter")


def test_a_trained_head_for_other_classes(tmp_path: Path) -> None:
    trained({"head": "linear"}, class_names=NAMES).save_adapter(tmp_path / "adapter")
    other = create_clip_model({"head": "linear"}, class_names=["ant", "bee", "fly"])
    with pytest.raises(UsageError, match=r"for the classes cat, dog, red car; .* ant, bee, fly"):
        other.load_adapter(tmp_path / "adapter")


def test_damaged_folders(tmp_path: Path) -> None:
    model = create_clip_model({})
    with pytest.raises(UsageError, match="holds no adapter"):
        model.load_adapter(tmp_path)
    model.save_adapter(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UsageError, match="is damaged"):
        model.load_adapter(tmp_path / "adapter")


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds other files \(thesis.txt\)"):
        create_clip_model({}).save_adapter(tmp_path)
    assert files(tmp_path) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("exchange", [True, False])
def test_saving_again_replaces_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(whole_folder, "_exchange", lambda *_: False)
    trained({"head": "linear"}, class_names=NAMES).save_adapter(tmp_path / "adapter")
    model = trained({}, shake=1)
    model.save_adapter(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "head.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_failed_write_leaves_the_old_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained({})
    model.save_adapter(tmp_path / "adapter")
    before = files(tmp_path / "adapter")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedclip.models.adapter_folder.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save_adapter(tmp_path / "adapter")
    assert files(tmp_path / "adapter") == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


KILLED = """
import sys
import time
from pathlib import Path
from fedclip.models.whole_folder import write_folder
for count in range(10**9):
    if count == 1:
        print("ready", flush=True)
    text = str(count) * 1000
    write_folder(
        Path(sys.argv[1]), ["a", "b"], lambda new: [(new / n).write_text(text) for n in "ab"]
    )
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="folders are exchanged on Linux")
def test_a_killed_writer_leaves_one_whole_folder(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    for attempt in range(5):
        command = [sys.executable, "-c", KILLED, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()  # the first folder is there
            until = time.monotonic() + 0.01 * attempt
            while time.monotonic() < until:
                assert folder.exists()
            writer.kill()
        assert (folder / "a").read_text() == (folder / "b").read_text()
    assert folder.name in {path.name for path in tmp_path.iterdir()}


def test_leftovers_of_a_killed_writer_are_taken_up(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    whole_folder.write_folder(folder, ["a"], lambda new: (new / "a").touch())
    folder.rename(tmp_path / ".adapter.old")
    (tmp_path / ".adapter.new").mkdir()
    with pytest.raises(ZeroDivisionError):
        whole_folder.write_folder(folder, ["a"], lambda _: 1 // 0)  # type: ignore[arg-type,return-value]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert files(folder) == {"a": b""}
