"""Hostile clients of a run: the data that they falsify, the engine that has them, the record."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fedclip.catalog import own_rows
from fedclip.data.federated_data import FederatedData
from fedclip.errors import UsageError
from fedclip.experiment.context import RunContext
from fedclip.federated.hostile import Attacked
from fedclip.federated.rounds import Engine
from fedclip.seeding import seed_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedclip.data.decode import Pixels

TARGET = 0
"""The class, by its place, that a backdoor's patch stands for."""
WHITE, SIDES = 255, 4
"""The patch: a white square, a quarter of the image's side, in the lower right corner."""


class StampedPixels:
    """Pixels `[n, 3, size, size]` of which some rows show a patch; stamped as they are read."""

    def __init__(self, pixels: Pixels, rows: NDArray[np.int64]) -> None:
        self._pixels = pixels
        self._stamped = np.zeros(len(pixels), dtype=bool)
        self._stamped[rows] = True
        self.shape, self.nbytes = pixels.shape, pixels.nbytes

    def __len__(self) -> int:
        """Number of images."""
        return len(self._pixels)

    def __getitem__(self, where: Any) -> Pixels:
        """A copy of some images, by any index of the first axis."""
        found = np.array(self._pixels[where])
        side = max(1, self.shape[-1] // SIDES)
        found[..., -side:, -side:][self._stamped[where]] = WHITE
        return found


def poisoned_data(context: RunContext) -> FederatedData | None:
    """The data that clients train on where hostile ones falsify theirs; None where none does.

    With a backdoor the test images show the patch too: its success is measured on them.
    """
    attack, hostile = context.config.attack, sorted(context.hostile)
    if context.processes.count > 1 and hostile:
        raise UsageError("attack.name: hostile clients see a whole round; leave torchrun out")
    if attack.name not in ("label_flip", "backdoor") or context.several:
        return None
    data, labels = context.data, context.data.labels.copy()
    own = {client: context.training[client] for client in hostile}
    if attack.name == "label_flip":
        for rows in own.values():
            labels[rows] = len(data.class_names) - 1 - labels[rows]
        return replace(data, labels=labels)
    stamped = [data.test]
    for client, rows in own.items():
        draw = np.random.default_rng(seed_for(context.config.seed, "backdoor", client))
        count = max(1, round((attack.chosen_strength or 0) * len(rows)))
        stamped.append(draw.permutation(rows)[:count])
        labels[stamped[-1]] = TARGET
    pixels = StampedPixels(data.pixels, np.concatenate(stamped))
    return replace(data, labels=labels, pixels=cast("Pixels", pixels))


def attacked(context: RunContext, engine: Engine) -> Engine:
    """The engine, some of whose clients attack where the configuration says so."""
    attack = context.config.attack
    if not context.hostile:
        return engine
    examples = {client: len(rows) for client, rows in context.training.items()}
    row, strength = own_rows("attacks")[attack.name], attack.chosen_strength or 0.0
    return Attacked(engine, row, strength, context.hostile, examples, context.config.seed)


def record_of(context: RunContext) -> dict[str, Any]:
    """What the summary says of the attack; nothing where the configuration names none."""
    attack = context.config.attack
    if attack.name == "none":
        return {}
    told = {"name": attack.name, "strength": attack.chosen_strength}
    return {"attack": told | {"clients": sorted(context.hostile)}}


def in_words(context: RunContext) -> str | None:
    """What a run says of its hostile clients; None where it has none."""
    attack = context.config.attack
    if not context.hostile:
        return None
    strength = "" if attack.chosen_strength is None else f" {attack.chosen_strength:g}"
    who = ", ".join(sorted(context.hostile))
    return f"an experiment with hostile clients: {attack.name}{strength} by {who}"
