"""The guide's Python blocks, pasted together, against a hub cache with a full-size ViT-B/32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from fedclip import base_folder

BLOCKS = Path(__file__).parents[1] / "support" / "files" / "guide_blocks.py"
HUB_ID = "openai/clip-vit-base-patch32"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"

# Runs the blocks as a script would; `aggregated_params` is what a framework's server sends back.
RUNNER = """
import json, runpy, sys, torch
from models.clip import create_clip_model

LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
QKVO = ["q_proj", "v_proj", "k_proj", "out_proj"]

def like_the_guides(**towers):
    lora = LORA | {"target_modules": towers}
    config = {"model_name": "openai/clip-vit-base-patch32", "num_classes": 10, "lora": lora}
    return create_clip_model(config, seed=1)

sent = like_the_guides(vision_encoder=QKVO).get_parameters()
model = runpy.run_path(sys.argv[1], {"aggregated_params": sent})["model"]
now = model.get_parameters()
images = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
with torch.no_grad():
    logits = model(images)
summary = model.get_model_summary()
del model
both = like_the_guides(vision_encoder=QKVO, text_encoder=QKVO)
print(json.dumps({
    "summary": summary,
    "received": all(torch.equal(now[name], value) for name, value in sent.items()),
    "classes": logits.shape[1],
    "both": both.get_lora_info()["trainable_parameters"],
    "class": type(both).__name__,
}))
"""


@pytest.fixture(scope="module")
def hub_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache as the hub's client keeps it: real sizes and formats, meaningless weights."""
    home = tmp_path_factory.mktemp("hf")
    repo = home / "hub" / ("models--" + HUB_ID.replace("/", "--"))
    commit = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    config = CLIPConfig()
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in CLIPModel(config).named_parameters()}
    weights = snapshot / "model.safetensors"
    tensors = {name: torch.full(shape, 0.01) for name, shape in shapes.items()}
    save_file(tensors, weights, {"format": "pt"})
    config.save_pretrained(snapshot)
    CLIPImageProcessorPil().save_pretrained(snapshot)
    words = json.loads((base_folder("tiny") / "vocab.json").read_text(encoding="utf-8"))
    merges = (base_folder("tiny") / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    tokenizer = CLIPTokenizer(
        vocab=words | {BEGIN: 49406, END: 49407},
        merges=[tuple(line.split()) for line in merges if line],
    )
    tokenizer.save_pretrained(snapshot)
    yield home
    weights.unlink()  # 605 MB that pytest would keep for three more runs


def test_the_guides_blocks_run_as_printed(hub_home: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HF_HOME": str(hub_home), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "PYTHONPATH"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(BLOCKS)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(last)
    head = 10 * 512 + 10
    first = "base_model.model.vision_model.encoder.layers.0.self_attn"
    assert printed == [
        "LoRA enabled: True",
        "LoRA trainable parameters: 589824",
        f"Total parameters: {151_277_313 + 589_824 + head:,}",
        f"Trainable parameters: {589_824 + head:,}",
        "LoRA parameter count: 98",
        f"  {first}.k_proj.lora_A.weight: torch.Size([8, 768])",
        f"  {first}.k_proj.lora_B.weight: torch.Size([768, 8])",
        f"  {first}.out_proj.lora_A.weight: torch.Size([8, 768])",
        f"  {first}.out_proj.lora_B.weight: torch.Size([768, 8])",
        f"  {first}.q_proj.lora_A.weight: torch.Size([8, 768])",
    ]
    assert found["summary"]["base_parameters"] == 151_277_313
    assert found["both"] == 983_040
    assert found["class"] == "CLIPLoRAWrapper"
    assert found["classes"] == 10
    assert found["received"]
    # What a reader of the guide sees besides: the advice on idle text layers, and no more.
    [advice] = [line for line in done.stderr.splitlines() if line.strip()][:-1]
    assert "gets no gradient" in advice
