"""A federation's data: pixels, labels, and which client uses which examples for what."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedclip.catalog import GIVEN
from fedclip.data.decode import Pixels
from fedclip.data.splits import SPLIT_RULE, ClientData, Indices

PRIVATE = "private"
"""Key of a partition record that leaves out which examples are whose."""
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class NewClasses:
    """Classes that nobody trains on: their names, test rows, and labels `[n]` among them."""

    class_names: tuple[str, ...]
    test: Indices
    labels: Indices


@dataclass(frozen=True)
class FederatedData:
    """Pixels `[n, 3, size, size]` uint8 and labels `[n]`, and who uses which.

    All index arrays point into `pixels` and `labels`; `validation` and `test` are the central
    sets. A bad image keeps a row of zeros that no index points at. With `data.train_classes`
    nothing but `new_classes` points at images of the other classes. With `captioned` the
    classes are captions, by number, and `pictures` `[n]` is the number of each image's picture,
    where one has several captions. `places` says by row where the image is found in the data set.
    `median_size` is the width and height of the image with the median shorter side, as it comes.
    With a `test_seed` the test examples do not depend on the run's seed.
    """

    name: str
    pixels: Pixels
    labels: Indices
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    clients: tuple[ClientData, ...]
    validation: Indices
    test: Indices
    bad_images: tuple[str, ...]
    fingerprint: str
    partition: dict[str, Any]
    new_classes: NewClasses | None = None
    captioned: bool = False
    pictures: Indices | None = None
    places: tuple[str | int, ...] = ()
    median_size: tuple[int, int] | None = None
    test_seed: int | None = None

    def counts(self, indices: Indices) -> list[int]:
        """Examples by class among `indices`."""
        return np.bincount(self.labels[indices], minlength=len(self.class_names)).tolist()

    def table(self, part: str | None = None) -> list[list[int]]:
        """Examples per client and class, `[clients, classes]`, of one part or of all three."""
        names = PARTS if part is None else (part,)
        return [
            self.counts(np.concatenate([getattr(client, name) for name in names]))
            for client in self.clients
        ]

    def training_table(self) -> tuple[tuple[str, ...], dict[str, list[int]]]:
        """Columns and rows, by client, of training examples; captions are too many for columns."""
        ids = [client.client_id for client in self.clients]
        if self.captioned:
            return ("pairs",), {c.client_id: [len(c.train)] for c in self.clients}
        return self.class_names, dict(zip(ids, self.table("train"), strict=True))

    def partition_record(self) -> dict[str, Any]:
        """What `partition.json` holds: who has which images, and enough to notice other data.

        `examples` names the images of every client and role, by path in the folder of images, or by
        row in the data set, so that another program can use the same division.
        """
        return {
            "split": SPLIT_RULE,
            "data": self.name,
            "fingerprint": self.fingerprint,
            "partition": self.partition,
            **({} if self.test_seed is None else {"test_seed": self.test_seed}),
            **self._classes_record(),
            "clients": [
                {"client_id": client.client_id}
                | {part: self._part_record(getattr(client, part)) for part in PARTS}
                for client in self.clients
            ],
            "validation": self._part_record(self.validation),
            "test": self._part_record(self.test),
            "bad_images": list(self.bad_images),
            "examples": {
                "clients": {
                    client.client_id: {part: self._places(getattr(client, part)) for part in PARTS}
                    for client in self.clients
                },
                "validation": self._places(self.validation),
                "test": self._places(self.test),
            },
        }

    def _places(self, indices: Indices) -> list[str | int]:
        return [self.places[i] for i in indices] if self.places else indices.tolist()

    def _classes_record(self) -> dict[str, Any]:
        if not self.captioned:
            # Of data in memory neither paths nor a file say which label is whose.
            own = hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest()
            return {"class_names": list(self.class_names)} | (
                {"labels_sha256": own} if self.name == GIVEN else {}
            )
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        digest.update(self.labels.astype("<i8").tobytes())
        return {"captions": len(self.class_names), "captions_sha256": digest.hexdigest()}

    def _part_record(self, indices: Indices) -> dict[str, Any]:
        digest = hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
        by_class = {} if self.captioned else {"by_class": self.counts(indices)}
        return {"num_examples": len(indices), **by_class, "indices_sha256": digest}


def private_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A partition record of a private run: numbers of examples, and not which ones they are."""

    def numbers(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {
                k: numbers(v) for k, v in part.items() if k not in ("by_class", "indices_sha256")
            }
        return [numbers(item) for item in part] if isinstance(part, list) else part

    return numbers({k: v for k, v in record.items() if k != "examples"}) | {PRIVATE: True}
