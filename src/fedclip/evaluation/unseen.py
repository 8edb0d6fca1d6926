"""What becomes of classes that were not trained: on other data sets, and on new classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedclip.data.datasets import load_source
from fedclip.data.decode import decode
from fedclip.data.federated_data import FederatedData
from fedclip.evaluation.metrics import accuracy
from fedclip.evaluation.predictions import How, classify
from fedclip.models.pretrained import load_pixels
from fedclip.models.stacked.prefix_cache import PixelInputs
from fedclip.models.wrapper import CLIPLoRAWrapper
from fedclip.records import State
from fedclip.seeding import seed_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_EXAMPLES = 1000
"""Examples of another data set, where `evaluation.max_examples` says nothing."""


@dataclass(frozen=True)
class Unseen:
    """Images `[n, 3, size, size]` with labels `[n]` of classes that the training did not have."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    templates: tuple[str, ...]


def forgetting(
    model: CLIPLoRAWrapper,
    shift: State,
    names: Sequence[str],
    *,
    max_examples: int | None,
    seed: int,
    how: How,
) -> dict[str, dict[str, float]]:
    """By data set, the accuracy of the base model (`zero_shot`) and of the current model.

    The text head takes each data set's own class names and templates. `shift` is the change of
    frozen weights that the model carries (`RunState.shift`).
    """
    found = {}
    for name in names:
        before, after = before_and_after(
            model, shift, other_data(name, model, max_examples or MOST_EXAMPLES, seed), how
        )
        found[name] = {"zero_shot": before, "accuracy": after}
    return found


def base_to_new(
    model: CLIPLoRAWrapper,
    shift: State,
    data: FederatedData,
    *,
    base: tuple[float, float],
    how: How,
) -> dict[str, float]:
    """Accuracy on base and on new classes, each among themselves, and their harmonic mean.

    `base` are the accuracies on base classes, zero-shot and trained, which the run knows. The data
    set must have `new_classes`. Source: Zhou et al. 2022, arXiv:2203.05557, section 4.1.
    """
    new = data.new_classes
    assert new is not None
    rows = new.test
    unseen = Unseen(data.pixels[rows], new.labels[rows], new.class_names, data.templates)
    before, after = before_and_after(model, shift, unseen, how)
    return {
        "base_accuracy": base[1],
        "new_accuracy": after,
        "harmonic_mean": harmonic_mean(base[1], after),
        "base_zero_shot_accuracy": base[0],
        "new_zero_shot_accuracy": before,
        "zero_shot_harmonic_mean": harmonic_mean(base[0], before),
    }


def before_and_after(
    model: CLIPLoRAWrapper, shift: State, unseen: Unseen, how: How
) -> tuple[float, float]:
    """Accuracy of the base model and of the current model, whose classes are restored."""
    classes = model.class_names, model.templates
    model.set_classes(unseen.class_names, unseen.templates)
    try:
        after = _accuracy(model, unseen, how)
        if shift:
            model.set_shift({})
        with model.zero_shot():
            return _accuracy(model, unseen, how), after
    finally:
        if shift:
            model.set_shift(shift)
        model.set_classes(*classes)


def other_data(name: str, model: CLIPLoRAWrapper, max_examples: int, seed: int) -> Unseen:
    """Test images of another data set, at most so many by a seeded draw.

    A data set without a test split gives of all its images: nobody has trained on them.
    """
    source = load_source(name)
    rows = np.arange(len(source)) if source.is_test is None else np.flatnonzero(source.is_test)
    if len(rows) > max_examples:
        draw = np.random.default_rng(seed_for(seed, "forgetting", name))
        rows = np.sort(draw.choice(rows, size=max_examples, replace=False))
    pixels, _ = decode(
        source,
        rows,
        model.to_pixels,
        load_pixels(model.base_name).key,
        on_bad_image="error",
    )
    return Unseen(pixels, source.labels[rows], source.class_names, source.templates)


def harmonic_mean(a: float, b: float) -> float:
    """2ab / (a + b), and 0 where both are."""
    return 2 * a * b / (a + b) if a + b else 0.0


def _accuracy(model: CLIPLoRAWrapper, unseen: Unseen, how: How) -> float:
    found = classify(
        model,
        PixelInputs(unseen.pixels, how.device),
        unseen.labels,
        np.arange(len(unseen.labels)),
        how,
    )
    share = accuracy(found)
    assert share is not None
    return share
