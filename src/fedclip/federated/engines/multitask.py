"""An engine for clients of several tasks: one engine per task, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from fedclip.federated.rounds import Engine
from fedclip.records import Cohort, State, TrainRequest


class TaskEngine:
    """Trains the clients of each task by that task's engine, on a model that all tasks share."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        task_of: Mapping[str, str],
        turn_to: Callable[[str, State], None],
    ) -> None:
        """`task_of` has every client's task; `turn_to` gives the model a task and a shift."""
        self._engines = engines
        self._task_of = task_of
        self._turn_to = turn_to

    def train(self, request: TrainRequest) -> Iterator[Cohort]:
        """Yields the updates task by task, inside a task in the order of the request."""
        for task, engine in self._engines.items():
            ids = tuple(c for c in request.client_ids if self._task_of[c] == task)
            if ids:
                self._turn_to(task, request.shift)
                yield from engine.train(replace(request, client_ids=ids))
