"""Export: a folder in the hub's own CLIP format, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPModel

from .model import IMAGE_SIZE

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
MEAN = STD = [0.5, 0.5, 0.5]


def image_processor() -> dict:
    """`preprocessor_config.json`: what `AutoImageProcessor` opens, with PIL alone."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }


def export(model: CLIPModel, tokenizer_folder: Path, folder: Path) -> None:
    """Write the model, its tokenizer and its image processor to `folder`."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    config = model.config.to_dict() | {"architectures": ["CLIPModel"], "dtype": "float32"}
    (fresh / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    drop = ("position_ids",)
    state = {
        k: v.detach().to(torch.float32).contiguous()
        for k, v in model.state_dict().items()
        if not k.endswith(drop)
    }
    save_file(state, fresh / "model.safetensors", metadata={"format": "pt"})
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_folder / name, fresh / name)
    text = json.dumps(image_processor(), indent=2) + "\n"
    (fresh / "preprocessor_config.json").write_text(text)
    folder.mkdir(parents=True, exist_ok=True)
    (fresh / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    for file in fresh.iterdir():
        file.replace(folder / file.name)
    fresh.rmdir()
