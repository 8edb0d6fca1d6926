"""The job in Apple's pfl-research: SimulatedBackend, FederatedAveraging, and its PyTorchModel.

    python pfl_research.py <workload folder> <output json>

One process; torch uses as many threads as there are cores, its default. pfl can also spread users
over processes under torchrun: with two of one thread each, on two cores, rounds took 0.66 s in
place of 0.55 s (10 clients of 2 x 32 images) and 0.80 s in place of 0.91 s (32 of 2 x 8), and the
start 3 s longer. So one process it is.

Locally AdamW, created afresh by pfl for each user; centrally SGD with rate 1, which adds the mean
update to the model.
"""

from __future__ import annotations

import sys
import time
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from peer_task import ClipClassifier, Job, load_job, write_outcome
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel


class PflClassifier(ClipClassifier):
    """The model with the two methods that pfl asks of a module."""

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of a batch."""
        self.train()
        return F.cross_entropy(self(images), labels)

    def metrics(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Weighted]:
        """Count the examples.

        pfl evaluates every user in iteration 0, whatever the evaluation frequency. This job has no
        evaluation, so there is no forward pass here.
        """
        return {"examples": Weighted(len(labels), 1)}


class Stopwatch(TrainingProcessCallback):
    """Seconds of every central iteration; pfl's own callback rounds them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """Start with the first iteration."""
        self._started = time.perf_counter()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Note the iteration that ended; the model has been updated already."""
        now = time.perf_counter()
        self.seconds.append(now - self._started)
        self._started = now
        return False, Metrics()


def federated_dataset(job: Job) -> FederatedDataset:
    """Users in turn, each with its examples in the order that the round asks for."""
    visits = [count() for _ in range(job.clients)]

    def make_dataset(user: int) -> Dataset:
        # Every user takes part in every round, so its visits count the rounds.
        examples = job.order[next(visits[user]), user].flatten()
        return Dataset((job.images[examples], job.labels[examples]), user_id=str(user))

    users = list(range(job.clients))
    return FederatedDataset(make_dataset, get_user_sampler("minimize_reuse", users))


def local_optimizer(job: Job, parameters: object, lr: float) -> torch.optim.Optimizer:
    """What pfl calls for every user, with all parameters of the model."""
    trainable = [p for p in parameters if p.requires_grad]  # type: ignore[attr-defined]
    return torch.optim.AdamW(trainable, lr=lr, betas=job.betas, weight_decay=job.weight_decay)


def main(folder: Path, output: Path) -> None:
    """Run all central iterations."""
    job = load_job(folder)
    module = PflClassifier(job)
    trainable = [p for p in module.parameters() if p.requires_grad]
    model = PyTorchModel(
        module,
        local_optimizer_create=lambda parameters, lr: local_optimizer(job, parameters, lr),
        central_optimizer=torch.optim.SGD(trainable, lr=1.0),
    )
    users = federated_dataset(job)
    stopwatch = Stopwatch()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=job.rounds,
            evaluation_frequency=job.rounds + 1,
            train_cohort_size=job.clients,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(users, users, postprocessors=[WeightByUser()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=job.learning_rate,
            local_batch_size=job.batch,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[stopwatch],
    )
    write_outcome(output, stopwatch.seconds, module.adapter(), ("pfl",))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
