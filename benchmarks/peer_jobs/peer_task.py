"""What every peer needs for the job: the data, the model, and one client's training.

It knows nothing of any framework, nor of fedclip. The peers' scripts find it beside themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel

State = dict[str, torch.Tensor]

# A GPU where this environment's torch finds one; the products are then in bf16.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Job:
    """A workload folder in memory; `images` are normalised, once, `[n, 3, 32, 32]`."""

    folder: Path
    rounds: int
    clients: int
    steps: int
    batch: int
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    lora: Mapping[str, object]
    images: torch.Tensor
    labels: torch.Tensor
    order: torch.Tensor
    text_features: torch.Tensor
    logit_scale: torch.Tensor

    @property
    def client_size(self) -> int:
        """Examples of one client."""
        return self.steps * self.batch


class ClipClassifier(nn.Module):
    """CLIP with LoRA in its vision tower; the classes' text features are given."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        clip = CLIPModel.from_pretrained(job.folder / "model")
        targets = "|".join(str(name) for name in job.lora["targets"])  # type: ignore[attr-defined]
        config = LoraConfig(
            r=job.lora["r"],  # type: ignore[arg-type]
            lora_alpha=job.lora["alpha"],  # type: ignore[arg-type]
            lora_dropout=0.0,
            target_modules=rf"vision_model\..*\.(?:{targets})",
        )
        self.network = get_peft_model(clip, config)
        self.texts = nn.Buffer(job.text_features, persistent=False)
        self.scale = nn.Buffer(job.logit_scale, persistent=False)
        self.load_adapter(load_file(job.folder / "adapter.safetensors"))
        self.to(DEVICE)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, classes]` of normalised images."""
        clip: Any = self.network.get_base_model()
        pooled = clip.vision_model(pixel_values=images).pooler_output
        features = F.normalize(clip.visual_projection(pooled), dim=-1)  # [batch, dim]
        return self.scale * features @ self.texts.T

    def adapter(self) -> State:
        """The LoRA tensors; they share memory with the model."""
        return get_peft_model_state_dict(self.network)

    def load_adapter(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put LoRA tensors in the place of the model's."""
        set_peft_model_state_dict(self.network, dict(state))


def load_job(folder: Path) -> Job:
    """Read a workload folder."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    data = load_file(folder / "data.safetensors")
    mean, std = (data[name].view(1, 3, 1, 1) for name in ("mean", "std"))
    optimizer = job["optimizer"]
    return Job(
        folder=folder,
        rounds=job["rounds"],
        clients=job["clients"],
        steps=job["steps"],
        batch=job["batch"],
        learning_rate=optimizer["learning_rate"],
        weight_decay=optimizer["weight_decay"],
        betas=(optimizer["betas"][0], optimizer["betas"][1]),
        lora=job["lora"],
        images=((data["pixels"].float() / 255 - mean) / std).to(DEVICE),
        labels=data["labels"].to(DEVICE),
        order=data["order"],
        text_features=data["text_features"],
        logit_scale=data["logit_scale"],
    )


def train_client(model: ClipClassifier, job: Job, server_round: int, client: int) -> None:
    """Train the model in place as one client in one round (counted from 1)."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=job.learning_rate, betas=job.betas, weight_decay=job.weight_decay
    )
    for batch in job.order[server_round - 1, client]:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            logits = model(job.images[batch])
        loss = F.cross_entropy(logits.float(), job.labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def write_outcome(
    output: Path,
    round_seconds: list[float],
    adapter: Mapping[str, torch.Tensor],
    packages: tuple[str, ...] = (),
) -> None:
    """Write the result file, and the aggregated adapter beside it as `<output>.safetensors`."""
    names = (*packages, "torch", "transformers", "peft", "numpy")
    outcome = {
        "round_seconds": round_seconds,
        "versions": {name: version(name) for name in names},
    }
    output.write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
    save_file(tensors, f"{output}.safetensors")
