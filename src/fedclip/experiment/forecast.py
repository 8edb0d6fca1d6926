"""What a run will take: a few steps and a few test images are measured, the rest is computed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch

from fedclip.config import AttackConfig, Config
from fedclip.data.splits import ClientData
from fedclip.evaluation.per_client import measured, validated
from fedclip.experiment.context import RunContext, Task
from fedclip.experiment.engine import create_engine, local_settings
from fedclip.experiment.evaluate import evaluate_run, how_of
from fedclip.experiment.strategy import choose_strategy
from fedclip.federated.engines.memory import activation_bytes
from fedclip.federated.engines.threads import IMAGES, MOST_THREADS
from fedclip.federated.privacy.charging import with_digest
from fedclip.federated.privacy.dp_sgd import DpSgd
from fedclip.federated.privacy.secret import Draws
from fedclip.federated.rounds import Engine, run_rounds, sample_clients
from fedclip.records import Cohort, RunState, TrainRequest

BUDGET = 3.0
"""Seconds that one measurement may take, as far as one step of one client allows."""
_MOST_STEPS = 8
_LATER = 130_000_000
"""Bytes that whole rounds and the run's end add on a CPU: buffers, freed memory in pieces. Runs of
`tiny` added 140 to 200 MB, whatever was measured before."""


@dataclass(frozen=True)
class Line:
    """Seconds that grow with a number of examples."""

    fixed: float
    each: float

    def at(self, examples: float) -> float:
        """Seconds for so many examples."""
        return self.fixed + self.each * examples

    @classmethod
    def through(cls, small: tuple[float, float], large: tuple[float, float] | None) -> Line:
        """The line through one or two measurements (examples, seconds); never falling."""
        (n, t), (m, u) = small, large or small
        if m <= n or u <= t:  # the larger one says more
            return cls(0.0, u / m)
        each = (u - t) / (m - n)
        return cls(max(0.0, t - each * n), each)


@dataclass(frozen=True)
class Forecast:
    """Seconds of a round's training, of an evaluation and of all; bytes of memory at the peak."""

    round_seconds: float
    evaluation_seconds: float
    evaluations: int
    rounds_seconds: float
    peak_bytes: int


def forecast(context: RunContext) -> Forecast:
    """Measure the beginnings of a round and of an evaluation, and extrapolate.

    Hostile clients train as long as honest ones.
    """
    config = context.config.model_copy(update={"attack": AttackConfig()})
    context = replace(context, config=config, poisoned=None)
    state = RunState(context.model.get_parameters())
    ids = _first_clients(context)
    training, asked = _training(context, state, ids)
    evaluation = _evaluation(context, state)
    examples = np.mean([context.clients[c] for c in context.clients])
    in_round = float(examples) * context.clients_per_round * config.client.local_epochs
    rounds, every = config.federation.rounds, config.evaluation.every
    evaluations = 1 + rounds // every + bool(rounds % every)
    a_round, a_test = training.at(in_round), evaluation.at(_tested(context))
    return Forecast(
        a_round,
        a_test,
        evaluations,
        rounds * a_round + evaluations * a_test,
        peak_memory(context.device)
        + _not_measured(context, asked)
        + (_LATER if context.device.type == "cpu" else 0),
    )


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: on a GPU its tensors, else all of it."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def free_memory(device: torch.device) -> int:
    """Bytes that this process could hold: what it has, and what is free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device))
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def _first_clients(context: RunContext) -> tuple[str, ...]:
    """The clients of the first round."""
    seed, count = context.config.seed, context.clients_per_round
    return sample_clients(context.clients, count, 1, seed)


def _training(
    context: RunContext, state: RunState, ids: Sequence[str]
) -> tuple[Line, Sequence[str]]:
    """Seconds of a round by its examples, and the clients with whom that was measured."""
    pilot = _one_round(context, state, ids[:1], 1)
    if pilot[1] < BUDGET:  # the first of its size makes kernels, and others may have disturbed
        again = _one_round(context, state, ids[:1], 1)
        pilot = min(pilot, again, key=lambda measured: measured[1])
    count = len(ids) if pilot[1] * len(ids) < BUDGET else max(1, int(BUDGET / pilot[1]))
    asked = ids[:count]
    small = pilot if count == 1 else _one_round(context, state, asked, 1)
    steps = min(_MOST_STEPS, int(BUDGET / small[1]))
    large = _one_round(context, state, asked, steps) if steps > 1 else None
    if large is None and count > 1:
        small, large = pilot, small
    return Line.through(small, large), asked


def _one_round(
    context: RunContext, state: RunState, ids: Sequence[str], steps: int
) -> tuple[float, float]:
    """Examples and seconds of a round of some clients with so many steps at most."""
    short = _shortened(context, ids, steps)
    engine = create_engine(short, _dp_sgd(short))
    examples = {c: n for c, n in short.clients.items() if n}
    started = time.perf_counter()
    rounds = run_rounds(
        state,
        _Named(engine) if context.config.privacy.unit == "example" else engine,
        choose_strategy(context),
        clients=examples,
        rounds=context.config.federation.rounds or 1,
        clients_per_round=len(examples),
        seed=context.config.seed,
    )
    next(rounds)
    return float(sum(examples.values())), time.perf_counter() - started


@dataclass(frozen=True)
class _Named:
    """An engine whose requests have the digest by which private draws are named."""

    inner: Engine

    def train(self, request: TrainRequest) -> Iterator[Cohort]:
        """Trains the clients of a request."""
        return self.inner.train(with_digest(request))


def _dp_sgd(context: RunContext) -> DpSgd | None:
    """DP-SGD with some noise, which takes as long as with any other."""
    if context.config.privacy.unit != "example":
        return None
    noise = dict.fromkeys(context.clients, 1.0)
    batch = context.config.data.batch_size
    return DpSgd(context.config.privacy.clip_norm, noise, Draws(bytes(32), "run", ""), batch)


def _shortened(context: RunContext, ids: Sequence[str], steps: int) -> RunContext:
    """The context with one local epoch of so many steps, for the clients that are asked."""
    epoch = context.config.client.model_copy(update={"local_epochs": 1})
    config = context.config.model_copy(update={"client": epoch})
    pooled = set(ids).isdisjoint(context.task_of)  # centralised: one client with all

    def cut(task: Task, own: Config) -> Task:
        most = steps * own.data.batch_size * own.data.accumulation_steps
        clients: Iterator[ClientData] = (
            replace(c, train=c.train[: most if pooled or c.client_id in ids else 0])
            for c in task.data.clients
        )
        return replace(task, data=replace(task.data, clients=tuple(clients)))

    own = context.by_task()
    tasks = {name: cut(task, own[name].config) for name, task in context.tasks.items()}
    return replace(context, config=config, tasks=tasks)


def _evaluation(context: RunContext, state: RunState) -> Line:
    """Seconds of an evaluation by its images."""
    batch = how_of(context).batch_size
    most = max(len(task.data.test) for task in context.tasks.values())
    if not most:
        return Line(0.0, 0.0)

    def timed(images: int) -> tuple[float, float]:
        short = replace(context, tasks={n: _fewer(t, images) for n, t in context.tasks.items()})
        started = time.perf_counter()
        evaluate_run(short, state)
        seconds = time.perf_counter() - started
        return float(sum(len(task.data.test) for task in short.tasks.values())), seconds

    first = min(most, 16)
    timed(1)
    small = timed(first)
    large = min(most, 4 * batch, int(first * BUDGET / small[1]))
    return Line.through(small, timed(large) if large > first else None)


def _fewer(task: Task, images: int) -> Task:
    """The task with so many test images at most, and none for validation or of clients."""
    data, none = task.data, task.data.test[:0]
    clients = tuple(replace(c, test=none, validation=none) for c in data.clients)
    test = data.test[:images]
    return replace(task, data=replace(data, test=test, validation=none, clients=clients))


def _tested(context: RunContext) -> int:
    """Images of one evaluation, each counted once."""
    limit, seed, found = context.config.evaluation.max_examples, context.config.seed, 0
    for task in context.tasks.values():
        test, by_client = measured(task.data, limit, seed)
        sets = [test, validated(task.data, limit, seed), *by_client.values()]
        found += len(np.unique(np.concatenate(sets)))
    return found


def _not_measured(context: RunContext, asked: Sequence[str]) -> int:
    """Bytes of activations of a pass's further clients."""
    config, size = context.config, context.config.engine.group_size
    if context.stacked is None or size is None or context.several:
        return 0
    in_pass = min(size, context.clients_per_round)
    if context.device.type == "cpu":
        side_by_side = min(MOST_THREADS, torch.get_num_threads())
        per_pass = max(1, round(IMAGES / config.data.batch_size))
        in_pass = min(in_pass, side_by_side * per_pass)
    others = sorted(context.clients.values(), reverse=True)[len(asked) : in_pass]
    if not others:
        return 0
    most = local_settings(config, context.precision).batch_size
    return len(others) * activation_bytes(
        context.stacked,
        context.model.get_parameters(),
        image_size=context.model.image_size,
        batch_size=max(1, round(float(np.mean([min(most, own) for own in others])))),
        device=context.device,
    )
