"""The figures of a federation: one pass over every example that any figure needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fedclip.data.federated_data import FederatedData
from fedclip.evaluation.accuracy import Classifier, Images, score, spread
from fedclip.seeding import seed_for

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


def evaluate_federation(
    model: Classifier,
    images: Images,
    data: FederatedData,
    *,
    max_examples: int | None,
    seed: int,
    device: torch.device,
    precision: str,
    batch_size: int,
) -> dict[str, Any]:
    """Accuracy and loss on the central test set, on validation, and on each client's test set.

    `max_examples` caps each of these sets by a fixed seeded draw, the same in every round.
    """
    test, by_client = measured(data, max_examples, seed)
    validation = at_most(data.validation, max_examples, seed_for(seed, "evaluation", "validation"))
    scores = score(
        model,
        images,
        data.labels,
        np.concatenate([test, validation, *by_client.values()]),
        device=device,
        precision=precision,
        batch_size=batch_size,
    )
    accuracies = {client_id: scores.accuracy(indices) for client_id, indices in by_client.items()}
    return {
        "accuracy": scores.accuracy(test),
        "test_loss": scores.loss(test),
        "test_examples": len(test),
        "validation_accuracy": scores.accuracy(validation),
        "client_accuracy": spread(accuracies),
        "accuracy_by_client": accuracies,
    }


def measured(
    data: FederatedData, max_examples: int | None, seed: int
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """The test examples that count: of the central set, and of each client by its id."""
    test = at_most(data.test, max_examples, seed_for(seed, "evaluation", "test"))
    by_client = {
        c.client_id: at_most(c.test, max_examples, seed_for(seed, "evaluation", c.client_id))
        for c in data.clients
    }
    return test, by_client


def evaluate_personal(
    classifier: Callable[[str], Classifier],
    images: Images,
    data: FederatedData,
    *,
    max_examples: int | None,
    seed: int,
    device: torch.device,
    precision: str,
    batch_size: int,
) -> dict[str, Any]:
    """The figures of models of the clients' own, each on its own examples.

    `classifier` gives a client's model by its id. The accuracies and the loss are over the test
    (and validation) examples of all clients together, each judged by its owner's model.
    """
    correct: list[float] = []
    validated: list[float] = []
    losses: list[float] = []
    by_client: dict[str, float | None] = {}
    tests = measured(data, max_examples, seed)[1]
    for client in data.clients:
        test = tests[client.client_id]
        scores = score(
            classifier(client.client_id),
            images,
            data.labels,
            np.concatenate([test, client.validation]),
            device=device,
            precision=precision,
            batch_size=batch_size,
        )
        by_client[client.client_id] = scores.accuracy(test)
        correct += [float(scores.correct[int(i)]) for i in test]
        validated += [float(scores.correct[int(i)]) for i in client.validation]
        losses += [scores.losses[int(i)] for i in test]
    return {
        "accuracy": float(np.mean(correct)) if correct else None,
        "test_loss": float(np.mean(losses)) if losses else None,
        "test_examples": len(correct),
        "validation_accuracy": float(np.mean(validated)) if validated else None,
        "client_accuracy": spread(by_client),
        "accuracy_by_client": by_client,
    }


def told_by_clients(
    found: Mapping[str, tuple[int, int]], clients: Iterable[str], personal: bool
) -> dict[str, Any]:
    """The figures of clients that test elsewhere and tell how many examples, and how many right.

    With `personal` models they also stand for the run's, which has no other.
    """
    by_client: dict[str, float | None] = {}
    for client_id in sorted(clients):
        tests, correct = found.get(client_id, (0, 0))
        by_client[client_id] = correct / tests if tests else None
    figures = {"client_accuracy": spread(by_client), "accuracy_by_client": by_client}
    if not personal:
        return figures
    tests, correct = (sum(pair[place] for pair in found.values()) for place in (0, 1))
    return figures | {
        "accuracy": correct / tests if tests else None,
        "test_loss": None,
        "test_examples": tests,
        "validation_accuracy": None,
    }


def together(by_task: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of several tasks in one: means over tasks, and what each client has."""
    clients = {c: a for found in by_task.values() for c, a in found["accuracy_by_client"].items()}
    keys = ("accuracy", "test_loss", "validation_accuracy")
    means = {key: _mean([found[key] for found in by_task.values()]) for key in keys}
    return means | {
        "test_examples": sum(found["test_examples"] for found in by_task.values()),
        "client_accuracy": spread(clients),
        "accuracy_by_client": clients,
        "accuracy_by_task": {name: found["accuracy"] for name, found in by_task.items()},
        "validation_accuracy_by_task": {
            name: found["validation_accuracy"] for name, found in by_task.items()
        },
    }


def _mean(values: list[float | None]) -> float | None:
    """The mean; None where a value is missing, as the rest would not be comparable."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def at_most(indices: NDArray[np.int64], limit: int | None, seed: int) -> NDArray[np.int64]:
    """So many of the indices at most, by a draw that depends on the seed alone."""
    if limit is None or len(indices) <= limit:
        return indices
    return np.sort(np.random.default_rng(seed).choice(indices, size=limit, replace=False))
