"""The quickstart again with transformers, PEFT and torch alone: does fedclip train what it says?

Federated averaging of a LoRA adapter, in plain loops and with draws of its own. fedclip trains
nothing here; of its run it takes the configuration and the split that `partition.json` records.

    fedclip run configs/quickstart.yaml --output runs/first
    python examples/plain_peft.py runs/first
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = ["the digit {}", "a handwritten digit {}", "a photo of the number {}", "the number {}"]
BASE = Path(__file__).resolve().parents[1] / "src/fedclip/models/tiny"  # in the hub's format


def images_and_labels(base):
    """All digits as the model sees them, `[n, 3, 32, 32]`, and their labels."""
    digits = load_digits()
    levels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    processor = CLIPImageProcessorPil.from_pretrained(base)
    colour = [np.repeat(image[..., None], 3, axis=-1) for image in levels]
    pixels = processor(colour, return_tensors="pt", input_data_format="channels_last")
    return pixels["pixel_values"], torch.from_numpy(digits.target)


@torch.no_grad()
def class_features(clip, base):
    """One text feature a class: the mean over the prompts, of length 1."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [template.format(name) for name in NAMES for template in TEMPLATES]
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    hidden = clip.text_model(**tokens).pooler_output
    features = normalize(clip.text_projection(hidden), dim=-1)
    return normalize(features.reshape(len(NAMES), len(TEMPLATES), -1).mean(dim=1), dim=-1)


def logits(model, texts, pixels):
    """Cosines of images and classes, times CLIP's own scale."""
    clip = model.get_base_model()
    images = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    return clip.logit_scale.exp() * normalize(images, dim=-1) @ texts.T


@torch.no_grad()
def accuracy_on(model, texts, pixels, labels):
    """Share of the images that the model classifies rightly."""
    model.eval()
    return (logits(model, texts, pixels).argmax(dim=1) == labels).float().mean().item()


def train_client(model, texts, pixels, labels, config, done, draw):
    """One client's epochs, from the state that the model holds; `done` rounds lie behind."""
    epochs, size = config["client"]["local_epochs"], config["data"]["batch_size"]
    settings, rounds = config["optimizer"], config["federation"]["rounds"]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=settings["weight_decay"])
    batches = [
        batch
        for _ in range(epochs)
        for batch in torch.randperm(len(labels), generator=draw).split(size)
    ]
    model.train()
    for step, batch in enumerate(batches):
        share = (done + step / len(batches)) / rounds  # of the run: the rate falls over all of it
        cosine = 0.5 * (1 + math.cos(math.pi * share))
        optimizer.param_groups[0]["lr"] = config["client"]["learning_rate"] * cosine
        cross_entropy(logits(model, texts, pixels[batch]), labels[batch]).backward()
        torch.nn.utils.clip_grad_norm_(trained, settings["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}


def main(run):
    """Train on a run's split; the accuracy before training and after each round."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    lora = config["model"]["lora"]
    layers = "|".join(lora["target_modules"]["vision_encoder"])
    split = json.loads((run / "partition.json").read_text())["examples"]

    torch.manual_seed(config["seed"])
    draw = torch.Generator().manual_seed(config["seed"])
    clip = CLIPModel.from_pretrained(BASE)
    pixels, labels = images_and_labels(BASE)
    texts = class_features(clip.eval(), BASE)
    adapter = LoraConfig(
        r=lora["r"], lora_alpha=lora["lora_alpha"], lora_dropout=lora["lora_dropout"],
        target_modules=rf"vision_model\.encoder\.layers\.\d+\.self_attn\.({layers})",
    )  # fmt: skip
    model = get_peft_model(clip, adapter)

    state = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    parts = {name: own["train"] for name, own in split["clients"].items()}
    total = sum(len(part) for part in parts.values())
    test = split["test"]
    accuracy = [accuracy_on(model, texts, pixels[test], labels[test])]
    for done in range(config["federation"]["rounds"]):
        mean = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        for part in parts.values():
            set_peft_model_state_dict(model, state)
            update = train_client(model, texts, pixels[part], labels[part], config, done, draw)
            for name in mean:
                mean[name] += len(part) / total * update[name]
        state = mean
        set_peft_model_state_dict(model, state)
        accuracy.append(accuracy_on(model, texts, pixels[test], labels[test]))
        print(f"round {done + 1}: accuracy {accuracy[-1]:.4f}", flush=True)
    theirs = json.loads((run / "summary.json").read_text())
    print(f"here:    {accuracy[-1]:.4f}, zero-shot {accuracy[0]:.4f}")
    print(f"fedclip: {theirs['accuracy']:.4f}, zero-shot {theirs['zero_shot_accuracy']:.4f}")
    return accuracy


if __name__ == "__main__":
    main(Path(sys.argv[1]))
