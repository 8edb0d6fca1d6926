"""The figures of a federation: central test and validation set, and each client's test set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fedclip.data.federated_data import FederatedData
from fedclip.evaluation.metrics import CLASS_FIGURES, METRICS, Metric, class_figures
from fedclip.evaluation.predictions import Classifier, How, Images, Predictions, classify
from fedclip.seeding import seed_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

Record = TypeVar("Record", bound=Sized)


def evaluate_federation(
    model: Classifier,
    images: Images,
    data: FederatedData,
    how: How,
    *,
    metrics: Mapping[str, Metric],
    max_examples: int | None,
    seed: int,
    keep_hits: bool = False,
    hear: Callable[[Predictions], None] = lambda found: None,
) -> dict[str, Any]:
    """Accuracy, loss and the chosen `metrics` on test, on validation, and on each client's test.

    `max_examples` caps each of these sets by a fixed seeded draw, the same in every round. Every
    example that any figure needs is computed once. With `keep_hits`, `test_hits` says which test
    examples are classified correctly: a bit each, in the data set's order, in hexadecimal. `hear`
    is called with the predictions on the test set.
    """
    test, by_client = measured(data, max_examples, seed)
    validation = validated(data, max_examples, seed)
    sets = [test, validation, *by_client.values()]
    found = classify(model, images, data.labels, np.concatenate(sets), how)
    on_test, on_validation, *own = found.split([len(rows) for rows in sets])
    hear(on_test)
    sites = dict(zip(by_client, own, strict=True))
    found_here = figures(on_test, on_validation, sites, _with_accuracy(metrics))
    hits = {"test_hits": np.packbits(on_test.correct).tobytes().hex()} if keep_hits else {}
    return found_here | class_figures(on_test, data.class_names) | hits


def measured(
    data: FederatedData, max_examples: int | None, seed: int
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """The test examples that count: of the central set, and of each client by its id."""
    seed = seed if data.test_seed is None else data.test_seed
    test = at_most(data.test, max_examples, seed_for(seed, "evaluation", "test"))
    by_client = {
        c.client_id: at_most(c.test, max_examples, seed_for(seed, "evaluation", c.client_id))
        for c in data.clients
    }
    return test, by_client


def validated(data: FederatedData, max_examples: int | None, seed: int) -> NDArray[np.int64]:
    """The examples of the central validation set that count."""
    return at_most(data.validation, max_examples, seed_for(seed, "evaluation", "validation"))


def evaluate_personal(
    classifier: Callable[[str], Classifier],
    images: Images,
    data: FederatedData,
    how: How,
    *,
    metrics: Mapping[str, Metric],
    max_examples: int | None,
    seed: int,
    hear: Callable[[Predictions], None] = lambda found: None,
) -> dict[str, Any]:
    """The figures of personalised models, each on its client's examples.

    `classifier` gives a client's model by its id. The central figures are over the test (and
    validation) examples of all clients together, each judged by its owner's model.
    """
    tests = measured(data, max_examples, seed)[1]
    by_client: dict[str, Predictions] = {}
    validated: list[Predictions] = []
    for client in data.clients:
        sets = [tests[client.client_id], client.validation]
        model = classifier(client.client_id)
        found = classify(model, images, data.labels, np.concatenate(sets), how)
        by_client[client.client_id], validation = found.split([len(rows) for rows in sets])
        validated.append(validation)
    on_test = Predictions.concatenate(list(by_client.values()))
    hear(on_test)
    on_validation = Predictions.concatenate(validated)
    found_here = figures(on_test, on_validation, by_client, _with_accuracy(metrics))
    return found_here | class_figures(on_test, data.class_names)


def figures(
    test: Record,
    validation: Record,
    by_client: Mapping[str, Record],
    metrics: Mapping[str, Callable[[Record], float | None]],
) -> dict[str, Any]:
    """Every metric on every set, under the keys of a line of `metrics.jsonl`.

    `metrics` has `accuracy` and `loss`, the latter for the test set alone, and any others.
    """
    found: dict[str, Any] = {}
    for name, metric in metrics.items():
        if name == "loss":
            continue
        own = {client_id: metric(record) for client_id, record in by_client.items()}
        found |= {name: metric(test)}
        if name == "accuracy":
            found |= {"test_loss": metrics["loss"](test), "test_examples": len(test)}
            found |= {"validation_loss": metrics["loss"](validation)}
        found |= {f"validation_{name}": metric(validation), f"client_{name}": spread(own)}
        found |= {f"{name}_by_client": own}
    return found


def spread(values: Mapping[str, float | None]) -> dict[str, float] | None:
    """Mean, min and max over clients, leaving out those without test examples."""
    known = [value for value in values.values() if value is not None]
    if not known:
        return None
    return {"mean": sum(known) / len(known), "min": min(known), "max": max(known)}


def told_by_clients(
    found: Mapping[str, tuple[int, int]],
    clients: Iterable[str],
    personal: bool,
    metrics: Iterable[str] = (),
) -> dict[str, Any]:
    """The figures of clients that test elsewhere and tell how many examples, and how many right.

    With `personal` models they also stand for the run's, which has no other; what the counts do
    not give is None, the chosen `metrics` among it.
    """
    by_client: dict[str, float | None] = {}
    for client_id in sorted(clients):
        tests, correct = found.get(client_id, (0, 0))
        by_client[client_id] = correct / tests if tests else None
    told = {"client_accuracy": spread(by_client), "accuracy_by_client": by_client}
    if not personal:
        return told
    tests, correct = (sum(pair[place] for pair in found.values()) for place in (0, 1))
    unknown = dict.fromkeys(key for name in metrics for key in (name, f"validation_{name}"))
    unknown |= dict.fromkeys(CLASS_FIGURES)
    return told | {
        "accuracy": correct / tests if tests else None,
        "test_loss": None,
        "test_examples": tests,
        "validation_accuracy": None,
        "validation_loss": None,
        **unknown,
    }


def together(
    by_task: Mapping[str, Mapping[str, Any]], metrics: Iterable[str] = ()
) -> dict[str, Any]:
    """The figures of several tasks in one: means over tasks, and what each client has.

    `metrics` are the chosen ones, beside accuracy. The worst class is that of all tasks.
    """
    found: dict[str, Any] = {
        f"{key}_by_task": {task: values.get(key) for task, values in by_task.items()}
        for key in CLASS_FIGURES
    }
    for key in ("majority_class_rate", "macro_f1"):
        found[key] = _mean([values.get(key) for values in by_task.values()])
    found["worst_class"] = _worst_of(found["worst_class_by_task"])
    for name in ("accuracy", *metrics):
        own = {c: a for task in by_task.values() for c, a in task[f"{name}_by_client"].items()}
        loss = ["test_loss", "validation_loss"] if name == "accuracy" else []
        for key in (name, *loss, f"validation_{name}"):
            found[key] = _mean([task[key] for task in by_task.values()])
        if name == "accuracy":
            found["test_examples"] = sum(task["test_examples"] for task in by_task.values())
        found |= {f"client_{name}": spread(own), f"{name}_by_client": own}
        for key in (name, f"validation_{name}"):
            found[f"{key}_by_task"] = {task: values[key] for task, values in by_task.items()}
    return found


def _with_accuracy(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    return {name: METRICS[name] for name in ("accuracy", "loss")} | dict(metrics)


def _worst_of(by_task: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """The class of the lowest recall, with its task's name; None if one is unknown."""
    known = [
        {"name": f"{task}: {worst['name']}", "recall": worst["recall"]}
        for task, worst in by_task.items()
        if worst is not None
    ]
    return min(known, key=lambda worst: worst["recall"]) if len(known) == len(by_task) else None


def _mean(values: list[float | None]) -> float | None:
    """The mean; None where a value is missing, as the rest would not be comparable."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def at_most(indices: NDArray[np.int64], limit: int | None, seed: int) -> NDArray[np.int64]:
    """So many of the indices at most, by a draw that depends on the seed alone."""
    if limit is None or len(indices) <= limit:
        return indices
    return np.sort(np.random.default_rng(seed).choice(indices, size=limit, replace=False))
