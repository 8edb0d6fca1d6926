"""What can be asked of a configuration or a run without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from fedclip.assembly import assemble, check_partition, evaluate_parts, model_seed
from fedclip.checkpoint import Checkpoint
from fedclip.compute import autocast, resolve_device, resolve_precision
from fedclip.config import Config
from fedclip.config_io import load_config
from fedclip.data.datasets import load_source
from fedclip.data.rgb import open_rgb
from fedclip.errors import UsageError
from fedclip.models.adapter_files import read_adapter
from fedclip.models.clip import CLIPLoRAWrapper, create_clip_model
from fedclip.reports.progress import Listener
from fedclip.runs import CONFIG, SUMMARY, RunFolder
from fedclip.strategy_choice import choose_strategy, expected_traffic

_BYTES = 4  # of an fp32 parameter, the format that travels
_BATCH = 64


def info(target: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Parameters and traffic of a configuration file or a run, against full fine-tuning.

    Counts are parameters, traffic is in bytes per client and round, each way. A finished run's
    summary comes with it.
    """
    path = Path(target)
    run_folder = RunFolder.open(path) if path.is_dir() else None
    config = load_config(run_folder.path / CONFIG if run_folder else path, overrides)
    model = create_clip_model(
        config.model, class_names=_class_names(config), seed=model_seed(config)
    )
    counts = model.get_model_summary()
    traffic = expected_traffic(config, model.trainable())
    full = counts["base_parameters"] * _BYTES
    facts: dict[str, Any] = {
        **counts,
        "bytes_up_per_client_round": traffic.up,
        "bytes_down_per_client_round": traffic.down,
        "full_fine_tuning_bytes": full,
        "times_less_traffic": 2 * full / sum(traffic) if sum(traffic) else None,
        "rounds": config.federation.rounds,
    }
    if run_folder and run_folder.is_finished():
        facts["summary"] = run_folder.read_json(SUMMARY)
    return facts


def evaluate(folder: str | Path, *, listener: Listener | None = None) -> dict[str, Any]:
    """Evaluates a finished run's adapter again, on the central test set and by client."""
    run_folder = finished_run(folder)
    with listener or Listener() as listener:
        parts = assemble(load_config(run_folder.path / CONFIG), listener)
        check_partition(parts.data, run_folder)
        personal = None
        if choose_strategy(parts).personal:
            checkpoint = Checkpoint.load(run_folder)
            personal = checkpoint.state if checkpoint else None
        else:
            parts.model.load_adapter(run_folder.path / "adapter")
        figures = evaluate_parts(parts, personal=personal)
    summary = run_folder.read_json(SUMMARY)
    return {"zero_shot_accuracy": summary["zero_shot_accuracy"], **figures}


def load_run_model(folder: str | Path) -> CLIPLoRAWrapper:
    """A finished run's model, with the last round's adapter and its classes, on the CPU."""
    run_folder = finished_run(folder)
    config = load_config(run_folder.path / CONFIG)
    adapter = run_folder.path / "adapter"
    _, notes, _ = read_adapter(adapter)
    model = create_clip_model(
        config.model,
        class_names=notes.class_names or None,
        templates=notes.templates or None,
        seed=model_seed(config),
    )
    model.load_adapter(adapter)
    return model


def predict(
    folder: str | Path, images: Sequence[str | Path], labels: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Classifies image files with a run's model.

    `labels` replaces the classes that the run was trained on; only a text head can take others.
    Each prediction holds the image's path, its label, the label's probability, and the
    probabilities of all labels, highest first.
    """
    model = load_run_model(folder)
    if labels:
        if model.head != "text":
            raise UsageError(
                "--labels: this run has a trained linear head, which knows its own classes only"
            )
        model.set_classes(labels, model.templates)
    config = load_config(RunFolder.open(folder).path / CONFIG)
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    model.to(device).eval()
    paths = [str(image) for image in images]
    opened = [_open(path) for path in paths]  # all are checked before any is classified
    predictions: list[dict[str, Any]] = []
    with torch.inference_mode(), autocast(precision, device):
        for batch in _batches(opened):
            logits = model(torch.from_numpy(model.to_pixels(batch)).to(device))
            for row in logits.float().softmax(dim=-1).tolist():
                ranked = sorted(zip(model.class_names, row, strict=True), key=lambda pair: -pair[1])
                predictions.append(
                    {
                        "image": paths[len(predictions)],
                        "label": ranked[0][0],
                        "confidence": ranked[0][1],
                        "scores": dict(ranked),
                    }
                )
    return predictions


def _batches(images: list[Image.Image]) -> Iterator[list[Image.Image]]:
    for first in range(0, len(images), _BATCH):
        yield images[first : first + _BATCH]


def _open(path: str) -> Image.Image:
    try:
        return open_rgb(Path(path))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such image file") from None
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: not an image that can be read: {error}") from None


def adapter_folder(path: str | Path) -> Path:
    """The adapter folder that a path means: a finished run's `adapter/`, or the path itself."""
    return finished_run(path).path / "adapter" if RunFolder(path).is_run() else Path(path)


def finished_run(folder: str | Path) -> RunFolder:
    """A run folder that holds a result."""
    run_folder = RunFolder.open(folder)
    if not run_folder.is_finished():
        raise UsageError(
            f"{folder}: this run is not finished; go on with it by `fedclip run --resume {folder}`"
        )
    return run_folder


def _class_names(config: Config) -> tuple[str, ...] | None:
    """The classes, as far as counting needs them: only a linear head's size depends on them."""
    data = config.data
    if data.class_names:
        return data.class_names
    try:
        return load_source(data.name, path=data.path, layout=data.layout).class_names
    except UsageError:
        if config.model.num_classes:
            return None
        if config.model.head == "linear":
            raise
        return ("any class",)
