"""The sequential engine: clients one after another on one resident model.

It is the readable reference that every faster engine is compared with.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedclip.errors import TrainingFailed, out_of_memory
from fedclip.federated.client import LocalTask, TrainableModel, local_train
from fedclip.federated.local_steps import LocalSettings
from fedclip.federated.losses import Objective, classification
from fedclip.federated.privacy.dp_sgd import DpSgd
from fedclip.federated.update_checks import ADVICE
from fedclip.lora.names import at_rank
from fedclip.records import ClientReport, Cohort, LeftOut, State, TrainRequest
from fedclip.seeding import seed_for

if TYPE_CHECKING:
    from numpy.typing import NDArray


class SequentialEngine:
    """Trains one client at a time; between clients only the trainable tensors are exchanged."""

    def __init__(
        self,
        model: TrainableModel,
        pixels: NDArray[np.uint8],
        labels: NDArray[np.int64],
        clients: Mapping[str, NDArray[np.int64]],
        settings: LocalSettings,
        *,
        seed: int,
        device: torch.device,
        objective: Objective = classification,
        private: DpSgd | None = None,
    ) -> None:
        """Takes the images `[n, 3, size, size]`, labels `[n]` and each client's example indices.

        With `private` every client trains by DP-SGD.
        """
        self._model = model
        self._pixels = pixels
        self._labels = labels
        self._clients = clients
        self._settings = settings
        self._seed = seed
        self._device = device
        self._objective = objective
        self._private = private

    def train(self, request: TrainRequest) -> Iterator[Cohort]:
        """Yields a cohort of one per client, in the order of `request.client_ids`.

        Of a client that has diverged it has no update, but what went wrong.
        """
        if request.shift:
            self._model.set_shift(request.shift)
        for client_id in request.client_ids:
            started = time.perf_counter()
            parameters = self._model.trainable()
            rank = request.ranks.get(client_id)
            state = request.start(client_id)
            state = state if rank is None else at_rank(state, rank)
            task = self._task(request, client_id, state)
            with torch.no_grad():
                for name, parameter in parameters.items():
                    frame = task.frames.get(name)
                    parameter.copy_(state[name] if frame is None else frame @ task.cores[name])
            indices = self._clients[client_id]
            try:
                with nullcontext() if rank is None else self._model.scaled_for_rank(rank):
                    result = local_train(
                        self._model,
                        self._pixels,
                        self._labels,
                        indices,
                        self._settings,
                        seed=seed_for(self._seed, request.purpose, request.server_round, client_id),
                        device=self._device,
                        progress=request.progress,
                        round_share=request.round_share,
                        task=task,
                        objective=self._objective,
                    )
            except torch.OutOfMemoryError:
                raise out_of_memory(f"client {client_id}, round {request.server_round}") from None
            except TrainingFailed as error:
                why = str(error).removesuffix(f"; {ADVICE}")
                yield Cohort((), {}, (LeftOut(client_id, "finite", why),))
                continue
            # Copies on the CPU are what travels, here as over a network.
            trained = parameters.keys() if request.trained is None else request.trained
            ended = {n: p for n, p in parameters.items() if n in trained} | task.cores
            update = {n: p.detach().cpu().clone()[None] for n, p in ended.items()}
            seconds = time.perf_counter() - started
            report = ClientReport(
                client_id,
                len(indices),
                result.loss,
                result.steps,
                seconds,
                result.rate_sum,
                result.start_loss,
            )
            yield Cohort((report,), update)

    def _task(self, request: TrainRequest, client_id: str, state: State) -> LocalTask:
        frames = {name: frame.to(self._device) for name, frame in request.frames.items()}
        return LocalTask(
            request.of(client_id),
            frames,
            cores={name: state[name].to(self._device) for name in frames},
            private=None if self._private is None else self._private.of(client_id, request),
        )
