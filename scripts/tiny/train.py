"""The training loop: contrastive, with several positives a picture, resumable at any checkpoint."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel

from . import evaluate, export
from .augment import augment, cosine
from .data import Data


@dataclass(frozen=True)
class Settings:
    """What a run is made of; it is written into the checkpoint and the card."""

    steps: int
    seed: int = 0
    batch_size: int = 512
    learning_rate: float = 1.2e-3
    weight_decay: float = 0.05
    warmup: int = 200
    average: float = 0.998
    most_logit_scale: float = 4.0
    processes: int = 2


def loss_of(
    images: Tensor, texts: Tensor, scale: Tensor, positive: Tensor, ignored: Tensor
) -> Tensor:
    """CLIP's symmetric loss with all positives of a row sharing the target, others left out."""
    logits = scale.exp() * images @ texts.T
    logits = logits.masked_fill(ignored, -1e4)
    target = positive.float() / positive.sum(1, keepdim=True)
    return (
        -(target * logits.log_softmax(1)).sum(1).mean()
        - (target * logits.T.log_softmax(1)).sum(1).mean()
    ) / 2


def gathered(own: Tensor) -> Tensor:
    """Every process's embeddings in rank order; gradients flow to this process's own alone."""
    if dist.get_world_size() == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.detach())
    parts[dist.get_rank()] = own
    return torch.cat(parts)


def sum_gradients(model: CLIPModel) -> None:
    """Add up the gradients of all processes: of the whole batch's loss, each holds its own part."""
    model.logit_scale.grad /= dist.get_world_size()  # every process has all of this one
    if dist.get_world_size() > 1:
        grads = [p.grad for p in model.parameters()]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))


class Run:
    """The model in training, its moving average and its optimizer."""

    def __init__(self, model: CLIPModel, average: CLIPModel, settings: Settings) -> None:
        self.model, self.average, self.settings = model, average, settings
        self.step, self.seconds = 0, 0.0
        named = dict(model.named_parameters())
        decayed = [p for n, p in named.items() if p.ndim > 1]
        plain = [p for n, p in named.items() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": plain, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.average.load_state_dict(model.state_dict())
        self.average.requires_grad_(False)

    def update(
        self, pixels: Tensor, ids: dict[str, Tensor], positive: Tensor, ignored: Tensor
    ) -> float:
        """One step of the optimizer; returns the loss."""
        s, model = self.settings, self.model
        rate = s.learning_rate * cosine(self.step, s.steps, s.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images = F.normalize(
            model.visual_projection(model.vision_model(pixels).pooler_output), dim=-1
        )
        texts = F.normalize(model.text_projection(model.text_model(**ids).pooler_output), dim=-1)
        loss = loss_of(gathered(images), gathered(texts), model.logit_scale, positive, ignored)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        sum_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=s.most_logit_scale)
            weight = 1 - min(s.average, (1 + self.step) / (10 + self.step))
            for mean, now in zip(self.average.parameters(), model.parameters(), strict=True):
                mean.lerp_(now, weight)
        self.step += 1
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write weights, average and moments in one safetensors file, whole or not at all."""
        state = {f"model/{k}": v for k, v in self.model.named_parameters()}
        state |= {f"average/{k}": v for k, v in self.average.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for part, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{part}/{name}"] = value
        run = {"step": self.step, "seconds": self.seconds, "settings": asdict(self.settings)}
        fresh = path.with_suffix(".new")
        tensors = {k: v.detach().contiguous() for k, v in state.items()}
        save_file(tensors, fresh, metadata={"run": json.dumps(run)})
        os.replace(fresh, path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. All settings but the number of steps must be the same."""
        found = about(path)
        ours = asdict(self.settings) | {"steps": found["settings"]["steps"]}
        if found["settings"] != ours:
            raise SystemExit(f"{path} is of a run with other settings: {found['settings']}")
        with safe_open(path, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        self.step, self.seconds = found["step"], found["seconds"]
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(tensors[f"model/{name}"])
                moments = ("step", "exp_avg", "exp_avg_sq")
                self.optimizer.state[p] = {m: tensors[f"{m}/{name}"] for m in moments}
            for name, p in self.average.named_parameters():
                p.copy_(tensors[f"average/{name}"])


def validation_pixels(data: Data) -> Tensor:
    """Icons of training families that training never sees, dark on white, at the model's size."""
    layers, coloured = data.icon_layers(data.validation)
    flat = 1 - layers[:, :1].repeat(1, 3, 1, 1)
    flat[coloured] += layers[coloured, 2:]
    return F.interpolate(flat, (32, 32), mode="area") * 2 - 1


def about(path: Path) -> dict:
    """Step, seconds and settings of a checkpoint."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["run"])


def part_of(size: int) -> slice:
    """This process's part of a batch."""
    each = size // dist.get_world_size()
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


def one_step(run: Run, data: Data, tokenizer) -> float:
    """Draw, augment and learn one batch; returns its loss."""
    size, seed, step = run.settings.batch_size, run.settings.seed, run.step
    batch = data.batch(size, seed, step, part_of(size))
    noise = torch.Generator().manual_seed((seed * 1_000_003 + step) * 64 + dist.get_rank())
    pixels = augment(batch.layers, batch.coloured, batch.strong, noise)
    ids = tokenizer(batch.captions, padding=True, truncation=True, return_tensors="pt")
    return run.update(pixels, dict(ids), batch.positive, batch.ignored)


class Watch:
    """Measures a run on the way, logs it, and keeps its checkpoint and its latest export."""

    def __init__(self, data: Data, tokenizer, work: Path, icons: Path, out: Path) -> None:
        self.data, self.tokenizer, self.work, self.out = data, tokenizer, work, out
        self.suite = evaluate.Suite(icons, limit=2000)
        self.held_back = validation_pixels(data)

    def __call__(self, run: Run, loss: float) -> dict:
        """Log a line, save and export; returns the line."""
        scores = self.suite(run.average, self.tokenizer)
        names, templates = self.data.validation_keys, evaluate.TEMPLATES["icons"]
        validation = evaluate.accuracy(
            run.average,
            self.tokenizer,
            self.held_back,
            self.data.validation_labels,
            names,
            templates,
        )
        line = {"step": run.step, "seconds": round(run.seconds), **scores}
        line |= {"validation": round(validation, 4), "loss": round(loss, 4)}
        line["scale"] = round(float(run.model.logit_scale.detach()), 3)
        with (self.work / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        run.save(self.work / "checkpoint.safetensors")
        self.export(run)
        return line

    def export(self, run: Run) -> None:
        """Write the averaged weights as a model folder."""
        export.export(run.average, self.work / "tokenizer", self.out)


def fit(run: Run, data: Data, tokenizer, watch: Watch | None, every: int = 250) -> None:
    """Train to the last step; the process that has a watch reports every so many steps."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=watch is None) as progress:
        task = progress.add_task("pretraining", total=run.settings.steps, completed=run.step)
        losses, since = [], time.perf_counter()
        while run.step < run.settings.steps:
            losses.append(one_step(run, data, tokenizer))
            progress.update(task, completed=run.step, description=f"loss {losses[-1]:.2f}")
            if run.step % every == 0 or run.step == run.settings.steps:
                run.seconds += time.perf_counter() - since
                if watch:
                    progress.console.print(watch(run, sum(losses) / len(losses)))
                losses, since = [], time.perf_counter()
    if watch:
        watch.export(run)  # also where a resumed run had no step left to take
