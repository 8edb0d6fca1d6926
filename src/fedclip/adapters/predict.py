"""A finished run's model, ready to classify images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from fedclip.adapters.find_images import read_image
from fedclip.adapters.load import load_run_model, of_run, run_and_adapter
from fedclip.config import Config
from fedclip.config.loading import load_config
from fedclip.data.pictures import checked_array, checked_list
from fedclip.device import autocast, resolve_device, resolve_precision
from fedclip.errors import UsageError
from fedclip.experiment.folder import CONFIG
from fedclip.files import as_rgb
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
    images: Sequence[Any],
    *,
    batch_size: int = BATCH,
    on_bad: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Classifies images, by path or in memory, one batch after another.

    Each prediction holds the image's path, or its number in the list, its label, the label's
    probability, and the probabilities of all labels, highest first. `on_bad` hears of each image
    that cannot be read, which is then left out. Without it all are read once before any is
    classified, and the first bad one raises a UsageError. `progress` hears how many of all are
    done.
    """
    if on_bad is None:
        for number, image in enumerate(images):
            _read(image, number)
    for first in range(0, len(images), batch_size):
        batch = images[first : first + batch_size]
        good, pixels = [], []
        for number, image in enumerate(batch, start=first):
            try:
                pixels.append(predictor.to_pixels(_read(image, number)))
                good.append(str(image) if isinstance(image, str | Path) else number)
            except UsageError as error:
                if on_bad is None:
                    raise
                on_bad(str(error))
        if good:
            for name, scores in zip(good, predictor.classify(np.stack(pixels)), strict=True):
                yield {"image": name, **best(scores), "scores": scores}
        if progress is not None:
            progress(first + len(batch), len(images))


def _read(image: Any, number: int) -> Image.Image:
    """An image as upright RGB; UsageError that names it where it cannot be read."""
    if isinstance(image, str | Path):
        return read_image(image)
    try:
        return as_rgb(image)
    except Exception as error:  # Pillow decodes lazily, and raises nearly anything
        raise UsageError(f"images[{number}] cannot be read: {error}") from error


def _listed(images: Any) -> Sequence[Any]:
    """Images as a list: paths as they are, what is in memory checked."""
    if isinstance(images, str | Path | Image.Image):
        return [images]
    if not isinstance(images, Sequence):
        return list(checked_array(images, "images"))
    for number, image in enumerate(images):
        if not isinstance(image, str | Path):
            checked_list([image], "images", first=number)
    return images


def predict(
    folder: str | Path,
    images: Any,
    labels: Sequence[str] | None = None,
    *,
    best: bool = False,
) -> list[dict[str, Any]]:
    """Classifies images with a run's model, the last round's, or with `best` the best one's.

    `images` is a path or a PIL image, a list of paths, PIL images and uint8 arrays
    `[height, width, 3]` or `[height, width]`, or one uint8 array of many. `labels` replaces the
    classes that the run was trained on; only a text head can take others. Each prediction holds
    the image's path (or its number in the list), its label, the label's probability, and the
    probabilities of all labels, highest first.
    """
    found = _listed(images)
    predictor = Predictor.of_run(folder, labels, best=best)
    return list(predictions(predictor, found))


def best(scores: dict[str, float]) -> dict[str, Any]:
    """The first label of ranked scores, and its probability."""
    label = next(iter(scores))
    return {"label": label, "confidence": scores[label]}


def require_text_head(model: CLIPLoRAWrapper, option: str) -> None:
    """UsageError where a trained head is asked for classes other than those of its training."""
    if model.head != "text":
        raise UsageError(
            f"{option}: this run has a trained linear head, which knows its own classes only"
        )


def _ranked(scores: dict[str, float]) -> dict[str, float]:
    return dict(sorted(scores.items(), key=lambda pair: -pair[1]))
