"""Training on a part of the classes, to see what becomes of the others.

The base-to-new protocol of Zhou et al. 2022 (CoCoOp, arXiv:2203.05557, section 4.1): a model is
trained on base classes alone and tested twice, on base classes against base classes and on new
classes against new classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedclip.config.names import class_key
from fedclip.data.federated_data import FederatedData, NewClasses
from fedclip.data.source import some
from fedclip.data.splits import ClientData, Indices
from fedclip.errors import FedclipWarning, UsageError


def with_base_classes(data: FederatedData, chosen: float | Sequence[str]) -> FederatedData:
    """The same federation with base classes only, and the others' test images as `new_classes`.

    `chosen` are the base classes by name, or their share: the first ones in the data set's order,
    rounded up. Clients that are left without a training example are left out.
    """
    base = _base(data.class_names, chosen)
    new = [label for label in range(len(data.class_names)) if label not in base]
    kept = np.isin(data.labels, base)

    def own(indices: Indices) -> Indices:
        return indices[kept[indices]]

    clients = [
        ClientData(c.client_id, own(c.train), own(c.validation), own(c.test)) for c in data.clients
    ]
    idle = {client.client_id for client in clients if not len(client.train)}
    if len(idle) == len(clients) or not kept[data.test].any():
        raise UsageError(
            "data.train_classes: no training or no test image has one of "
            f"{some(data.class_names[i] for i in base)}; choose other classes"
        )
    if idle:
        warnings.warn(
            f"clients without an image of a base class are left out: {some(idle)}",
            FedclipWarning,
            stacklevel=3,
        )
    return replace(
        data,
        labels=_renumbered(data.labels, base),
        class_names=tuple(data.class_names[i] for i in base),
        clients=tuple(client for client in clients if client.client_id not in idle),
        validation=own(data.validation),
        test=own(data.test),
        new_classes=NewClasses(
            tuple(data.class_names[i] for i in new),
            data.test[~kept[data.test]],
            _renumbered(data.labels, new),
        ),
    )


def _base(names: Sequence[str], chosen: float | Sequence[str]) -> list[int]:
    if isinstance(chosen, float):
        count = math.ceil(len(names) * chosen - 1e-9)
        listed = list(names[:count])
    else:
        own = {class_key(name): name for name in names}
        listed = [own.get(class_key(name), name) for name in chosen]
    unknown = [name for name in listed if name not in names]
    if unknown:
        raise UsageError(
            f"data.train_classes: {some(unknown)} is no class of the data set ({some(names)})"
        )
    if len(set(listed)) == len(names):
        raise UsageError(
            f"data.train_classes leaves no new class of the {len(names)} that there are; choose "
            "fewer, or null to train on all"
        )
    return [label for label, name in enumerate(names) if name in listed]


def _renumbered(labels: Indices, classes: Sequence[int]) -> Indices:
    """Places of labels in a list of classes; -1 for those outside."""
    table = np.full(int(max(labels.max(), *classes)) + 1, -1, dtype=np.int64)
    table[list(classes)] = np.arange(len(classes))
    return table[labels]
