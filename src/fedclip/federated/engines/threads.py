"""Thread-parallel batched training on a CPU: every thread trains a part of the group.

Threads that share each operation wait for each other at its end, hundreds of times a step, and one
that is held up holds up all. Threads with clients of their own meet once a group.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from dataclasses import replace
from threading import Event

import torch

from fedclip.federated.engines.batched import BatchedEngine
from fedclip.records import Cohort, TrainRequest

MOST_THREADS = 4
"""All of them take turns with Python's lock; with more cores each thread has some of them."""

LOPSIDED = 1.1
"""A group is trained as a whole where the fullest thread has more than so many times its share."""

IMAGES = 160
"""About so many images in a thread's pass: enough to work on, and few enough for its memory."""


def on_all_threads(engine: BatchedEngine) -> BatchedEngine | SideBySide:
    """The engine on torch's threads, side by side where its clients' rows lie end to end."""
    return engine if engine.padded else SideBySide(engine, torch.get_num_threads())


class SideBySide:
    """The batched engine in several threads, with the clients divided among them."""

    def __init__(self, engine: BatchedEngine, threads: int) -> None:
        """`threads` are torch's, as long as nobody trains."""
        self._engine = engine
        self._per_pass = max(1, round(IMAGES / engine.batch_size))
        self._threads = threads

    def train(self, request: TrainRequest) -> Iterator[Cohort]:
        """Yields a cohort per group, in the order of `request.client_ids`, largest first."""
        self._engine.prepare(request)
        request = replace(request, shift={})  # done, for all threads
        ids = request.client_ids
        while ids:
            group, ids = ids[: self._engine.group_size], ids[self._engine.group_size :]
            sizes = {client_id: self._engine.examples(client_id) for client_id in group}
            parts = deal(group, sizes, min(self._threads, MOST_THREADS, len(group)))
            if parts is None:
                yield from self._engine.train(replace(request, client_ids=group))
            else:
                yield self._apart(group, parts, request)

    def _apart(
        self, group: Sequence[str], parts: Sequence[tuple[str, ...]], request: TrainRequest
    ) -> Cohort:
        each, stop = max(1, self._threads // len(parts)), Event()

        def alone(part: tuple[str, ...]) -> list[Cohort]:
            torch.set_num_threads(each)
            passes = -(-len(part) // self._per_pass)
            engine = self._engine.part(-(-len(part) // passes), stop)
            try:
                return list(engine.train(replace(request, client_ids=part)))
            except BaseException:
                stop.set()
                raise

        started = time.perf_counter()
        try:
            with ThreadPoolExecutor(len(parts)) as pool:
                futures = [pool.submit(alone, part) for part in parts]
                try:
                    wait(futures)
                finally:  # after Ctrl-C nobody waits for the others to finish
                    stop.set()
        finally:
            torch.set_num_threads(self._threads)  # a part of it is the whole process's
        for error in (future.exception() for future in futures):
            if error is not None and not isinstance(error, CancelledError):
                raise error
        cohorts = [cohort for future in futures for cohort in future.result()]
        return together(group, cohorts, time.perf_counter() - started)


def deal(ids: Sequence[str], sizes: Mapping[str, int], hands: int) -> list[tuple[str, ...]] | None:
    """Clients dealt out, each to whom has least so far; None where that is lopsided, or to one."""
    loads, dealt = [0] * hands, [list[str]() for _ in range(hands)]
    for client_id in ids:
        least = loads.index(min(loads))
        loads[least] += sizes[client_id]
        dealt[least].append(client_id)
    if hands == 1 or max(loads) * hands > LOPSIDED * sum(loads):
        return None
    return [tuple(hand) for hand in dealt]


def together(ids: Sequence[str], cohorts: Sequence[Cohort], seconds: float) -> Cohort:
    """One cohort in the order of `ids`; the seconds are shared out by the clients' steps."""
    reports = [report for cohort in cohorts for report in cohort.reports]
    place = {report.client_id: index for index, report in enumerate(reports)}
    order = [place[client_id] for client_id in ids]
    a_step = seconds / sum(report.steps for report in reports)
    timed = tuple(replace(reports[i], seconds=a_step * reports[i].steps) for i in order)
    tensors = {
        name: torch.cat([cohort.tensors[name] for cohort in cohorts])[order]
        for name in cohorts[0].tensors
    }
    return Cohort(timed, tensors)
