"""A finished run's model, ready to classify images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedclip.adapters.find_images import read_image
from fedclip.adapters.load import load_run_model, of_run, run_and_adapter
from fedclip.config import Config
from fedclip.config.loading import load_config
from fedclip.device import autocast, resolve_device, resolve_precision
from fedclip.errors import UsageError
from fedclip.experiment.folder import CONFIG
from fedclip.models.clip import CLIPLoRAWrapper

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH = 64


class Predictor:
    """A model on its device and in its precision. Only one thread at a time may use it."""

    def __init__(self, model: CLIPLoRAWrapper, device: torch.device, precision: str) -> None:
        self.model = model.to(device).eval()
        self._device = device
        self._precision = precision
        self.class_names = model.class_names

    @classmethod
    def of_run(
        cls, folder: str | Path, labels: Sequence[str] | None = None, *, best: bool = False
    ) -> Predictor:
        """The model of a finished run or of an adapter in it, on the device that the run asks for.

        `folder` may be whatever `load_run_model` takes; with `best` it is a run's, and the best
        round by validation counts. `labels` replaces the classes that it was trained on; only a
        text head can take others.
        """
        model = load_run_model(folder, best=best)
        if labels:
            require_text_head(model, "--labels")
            model.set_classes(labels, model.templates)
        run = of_run(folder)
        config = load_config(run_and_adapter(folder)[0].path / CONFIG) if run else Config()
        device = resolve_device(config.device)
        return cls(model, device, resolve_precision(config.precision, device))

    def to_pixels(self, image: Any) -> NDArray[np.uint8]:
        """One PIL image as the model's input, uint8 `[3, size, size]`; any thread may call this."""
        return self.model.to_pixels([image])[0]

    def classify(
        self, pixels: NDArray[np.uint8], labels: Sequence[str] | None = None
    ) -> list[dict[str, float]]:
        """Probabilities by class, highest first, for each image of `[n, 3, size, size]`.

        `labels` are classes for this call alone; a linear head refuses them by a UsageError.
        """
        names = tuple(labels or self.class_names)
        if not names:
            raise UsageError(
                "labels: this run has learned from captions and has no classes of its own; name "
                'some (--labels "a dog,a cat")'
            )
        if names != self.model.class_names:
            require_text_head(self.model, "labels")
            self.model.set_classes(names, self.model.templates)
        with torch.inference_mode(), autocast(self._precision, self._device):
            logits = self.model(self._inputs(pixels))
        rows = logits.float().softmax(dim=-1).tolist()
        return [_ranked(dict(zip(names, row, strict=True))) for row in rows]

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Image features `[n, dim]` of length one, of `[n, 3, size, size]`."""
        with torch.inference_mode(), autocast(self._precision, self._device):
            return self.model.encode_images(self._inputs(pixels)).float().cpu().numpy()

    def _inputs(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        return torch.from_numpy(pixels).to(self._device)


def predictions(
    predictor: Predictor,
    paths: Sequence[str],
    *,
    batch_size: int = BATCH,
    on_bad: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Classifies image files one batch after another: no more than a batch is in memory.

    Each prediction holds the image's path, its label, the label's probability, and the
    probabilities of all labels, highest first. `on_bad` hears of each file that cannot be read,
    which is then left out. Without it all files are read once before any is classified, and the
    first bad one raises a UsageError. `progress` hears how many of all are done.
    """
    if on_bad is None:
        for path in paths:
            read_image(path)
    for first in range(0, len(paths), batch_size):
        batch = paths[first : first + batch_size]
        good, pixels = [], []
        for path in batch:
            try:
                pixels.append(predictor.to_pixels(read_image(path)))
                good.append(path)
            except UsageError as error:
                if on_bad is None:
                    raise
                on_bad(str(error))
        if good:
            for path, scores in zip(good, predictor.classify(np.stack(pixels)), strict=True):
                yield {"image": path, **best(scores), "scores": scores}
        if progress is not None:
            progress(first + len(batch), len(paths))


def predict(
    folder: str | Path,
    images: Sequence[str | Path],
    labels: Sequence[str] | None = None,
    *,
    best: bool = False,
) -> list[dict[str, Any]]:
    """Classifies image files with a run's model, the last round's, or with `best` the best one's.

    `labels` replaces the classes that the run was trained on; only a text head can take others.
    Each prediction holds the image's path, its label, the label's probability, and the
    probabilities of all labels, highest first.
    """
    predictor = Predictor.of_run(folder, labels, best=best)
    return list(predictions(predictor, [str(image) for image in images]))


def best(scores: dict[str, float]) -> dict[str, Any]:
    """The first label of ranked scores, and its probability."""
    label = next(iter(scores))
    return {"label": label, "confidence": scores[label]}


def require_text_head(model: CLIPLoRAWrapper, option: str) -> None:
    """UsageError where other classes are asked of a head that was trained on its own."""
    if model.head != "text":
        raise UsageError(
            f"{option}: this run has a trained linear head, which knows its own classes only"
        )


def _ranked(scores: dict[str, float]) -> dict[str, float]:
    return dict(sorted(scores.items(), key=lambda pair: -pair[1]))
