"""A run from start to end: build the context, go through the rounds, write the run folder.

This is the file to read first. A fresh run and one that goes on after a kill take the same path:
the only difference is where the round loop starts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedclip.config import Config
from fedclip.config.loading import config_from_dict, dump_config, load_config
from fedclip.device import resolve_device
from fedclip.experiment import hostile, secure
from fedclip.experiment.build import (
    build,
    check_split_rule,
    with_absolute_paths,
)
from fedclip.experiment.class_coverage import Coverage, check_measurable
from fedclip.experiment.context import RunContext
from fedclip.experiment.early_stopping import Patience
from fedclip.experiment.engine import create_engine, step_settings
from fedclip.experiment.evaluate import evaluate_merged
from fedclip.experiment.folder import CONFIG, PATIENCE, RunFolder, next_folder
from fedclip.experiment.identity import check_config, take_up
from fedclip.experiment.openness import Openness
from fedclip.experiment.predictions_file import write_predictions
from fedclip.experiment.privacy_checks import check_privacy
from fedclip.experiment.privacy_of_sites import take_up_privacy
from fedclip.experiment.round_files import OpenRun, record_partition
from fedclip.experiment.round_records import Judge, before_training, round_record
from fedclip.experiment.save_adapters import adapter_digests, save_adapters
from fedclip.experiment.stopwatch import Stopwatch
from fedclip.experiment.strategy import choose_strategy, held_in_memory
from fedclip.experiment.summary import summarise
from fedclip.experiment.summary_file import read_summary, write_summary
from fedclip.federated.engines.sharded import Processes
from fedclip.federated.privacy.ledger import BudgetSpent
from fedclip.federated.rounds import Engine, RoundResult, run_rounds
from fedclip.federated.strategies import Strategy
from fedclip.federated.updates import Quorum
from fedclip.records import RunState, plain_json
from fedclip.reports.curves import curves_png
from fedclip.reports.listener import Heard, Listener, Listeners
from fedclip.reports.trackers.tracking import tracked, tracker_classes


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and its figures (`summary.json`).

    Of several processes on one run only the first knows the figures.
    """

    folder: Path
    summary: dict[str, Any]

    @property
    def adapter(self) -> Path:
        """The last round's adapter, a PEFT folder."""
        return self.folder / "adapter"


def run(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    output: str | Path | None = None,
    listener: Heard | Sequence[Heard] | None = None,
) -> Run:
    """Runs a configuration, given as a tree, a dictionary or a YAML file, into a new folder.

    `output` is the run folder, by default the next free one under `runs/`. A listener, or several,
    hear of the run's events; what they raise ends it, and the last finished round is kept. Raises
    UsageError for anything that the user can mend, before the folder is made.
    """
    name = Path(config).stem if isinstance(config, str | Path) else "run"
    started = time.perf_counter()
    config = with_absolute_paths(as_config(config))
    path = Path(output) if output else next_folder(name)
    RunFolder.check_free(path)  # before anything slow
    tracker_classes(config)
    with (
        Processes.join(resolve_device(config.device)) as processes,
        _listeners(listener, processes) as heard,
    ):
        context = build(config, heard, processes)
        strategy = choose_strategy(context)
        check_measurable(context, strategy.personal)
        check_privacy(context, choose_strategy)
        secure.check_secure(context, choose_strategy)
        if not processes.is_first:
            return _follow(context, strategy, path)
        folder = RunFolder.create(path, dump_config(context.config))
        return carry_out(context, strategy, folder, heard, started)


def resume(folder: str | Path, *, listener: Heard | Sequence[Heard] | None = None) -> Run:
    """Goes on with a run that was stopped; a finished one is returned as it is.

    One that a listener has ended early goes on to the last round of its configuration.
    """
    run_folder = RunFolder.open(Path(folder))
    if not run_folder.has_rounds_left():
        return Run(run_folder.path, read_summary(run_folder))
    check_split_rule(run_folder)  # before anything slow
    started = time.perf_counter()
    config = load_config(run_folder.path / CONFIG)
    with (
        Processes.join(resolve_device(config.device)) as processes,
        _listeners(listener, processes) as heard,
    ):
        check_config(config, run_folder, heard)  # before the folder's code is run
        tracker_classes(config)
        context = build(config, heard, processes)
        strategy = choose_strategy(context)
        check_privacy(context, choose_strategy)
        secure.check_secure(context, choose_strategy)
        if not processes.is_first:
            return _follow(context, strategy, run_folder.path)
        return carry_out(context, strategy, run_folder, heard, started)


def _listeners(given: Heard | Sequence[Heard] | None, processes: Processes) -> Listeners:
    """All that listen to a run, put together here alone; only the first process has any."""
    listeners = Listeners.of(given)
    return listeners if processes.is_first else Listeners([])


def as_config(config: Config | Mapping[str, Any] | str | Path) -> Config:
    """A configuration from any of its forms, checked."""
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return config_from_dict(config)
    return load_config(Path(config))


def carry_out(
    context: RunContext,
    strategy: Strategy,
    folder: RunFolder,
    listener: Listener,
    started: float,
    engine: Engine | None = None,
    judge: Judge | None = None,
) -> Run:
    """The path of every run: partition, zero-shot, rounds, adapter, summary.

    The engine is the one that the configuration names, unless another is given. `judge` has figures
    of the last round, where the clients' tests are elsewhere.
    """
    config = context.config
    with folder.exclusive(), tracked(config, folder.path, listener.message) as trackers:
        listener = Listeners([listener, trackers])
        listener.start(config)
        checkpoint = take_up(context, folder)
        record_partition(context, folder, listener)
        privacy = take_up_privacy(context, folder, checkpoint, listener)
        if engine is None:
            trained = privacy.engine(partial(create_engine, context))
            engine = secure.masked_engine(context, trained)
        strategy = privacy.strategy(strategy)
        personal = strategy.personal and context.sites is None  # else those models are elsewhere
        folder.truncate_metrics(checkpoint.finished_rounds, checkpoint.metrics_sha256)
        coverage = Coverage.of(context, personal)
        if privacy.tells_classes:
            coverage.warn_of_tests()
        coverage.warn_of_choices(config.evaluation)
        total = config.federation.rounds
        patience = Patience(config.evaluation.patience, total, folder.read_metrics())
        finished = checkpoint.finished_rounds if patience.reason is None else total
        context.processes.first_start(finished, checkpoint.state)
        folder.reopen()
        run = OpenRun(context, folder, checkpoint, listener, privacy, personal, Stopwatch(started))
        if checkpoint.finished_rounds < 0:
            run.write(before_training(context, checkpoint.state, personal))
        listener.rounds(checkpoint.finished_rounds, total, context.clients_per_round)
        rounds = rounds_of(
            context, engine, strategy, max(0, finished), checkpoint.state, listener, privacy
        )
        closing = _train(run, rounds, patience, judge)
        if privacy.tells_classes:
            write_predictions(context, checkpoint.state, folder, personal)
        finished_run = _finish_run(run, coverage, closing)
        from fedclip.experiment.report import write_report  # matplotlib is slow to import

        write_report(folder)
        listener.finish(finished_run.summary)
        return finished_run


def _train(
    run: OpenRun, rounds: Iterator[RoundResult], patience: Patience, judge: Judge | None
) -> dict[str, Any]:
    """Go through the rounds; returns why the run ends early, with its figures, if it does."""
    total, every = run.context.config.federation.rounds, run.context.config.evaluation.every
    try:
        for result in rounds:
            run.checkpoint.add(result)
            last = result.server_round == total
            due = last or result.server_round % every == 0
            record = round_record(result) | run.figures(result, due)
            end = patience.hear(record) or last
            if end and judge is not None:
                record |= judge(result)
            run.write(record)
            if last:
                continue
            if (reason := _reason_to_stop(run.context, run.listener, patience)) is not None:
                figures = {} if end else run.figures(result, not due, judge)
                return {"stopped_by": reason} | figures
    except BudgetSpent as spent:
        result = RoundResult(run.checkpoint.finished_rounds, run.checkpoint.state, ())
        return {"stopped_by": str(spent)} | run.figures(result, True, judge)
    return {"stopped_by": patience.reason}


def _reason_to_stop(context: RunContext, listener: Listener, patience: Patience) -> str | None:
    """Why the run is to end after this round, of which all processes learn."""
    reason = patience.reason
    if reason is None and (reason := listener.stop()) is not None and reason.startswith(PATIENCE):
        reason = f"a listener: {reason}"  # or a resume would not go on from here
    context.processes.first_numbers([int(reason is not None)])
    return reason


def _follow(context: RunContext, strategy: Strategy, path: Path) -> Run:
    """The path of every process but the first: its share of each round, and nothing written."""
    finished, state = context.processes.first_start(-1, RunState({}))
    engine = create_engine(context)
    start, listener = (max(0, finished), state), Listener()
    for result in rounds_of(context, engine, strategy, *start, listener, Openness()):
        last = result.server_round == context.config.federation.rounds
        if not last and context.processes.first_numbers([0]) != [0]:  # a listener ends the run
            break
    return Run(path, {})


def rounds_of(
    context: RunContext,
    engine: Engine,
    strategy: Strategy,
    finished: int,
    state: RunState,
    listener: Listener,
    privacy: Openness,
) -> Iterator[RoundResult]:
    """The rounds of a run that are left after those that are finished."""
    config = context.config
    for words in (held_in_memory(context), secure.in_words(context), hostile.in_words(context)):
        if words:
            listener.message(words)
    found = run_rounds(
        state,
        engine,
        strategy,
        clients=context.clients,
        rounds=config.federation.rounds,
        clients_per_round=context.clients_per_round,
        seed=config.seed,
        finished_rounds=finished,
        on_client=Listener().client if config.secure.masked else privacy.hears(listener),
        on_steps=listener.steps if privacy.tells_classes and not config.secure.masked else None,
        combine=context.processes.combine,
        quorum=Quorum(config.deploy.quorum, config.robust.least),
        settings=step_settings(context),
        sample=privacy.sample,
        masked=config.secure.masked,
    )
    return map(privacy.result, found)


def _finish_run(run: OpenRun, coverage: Coverage, closing: Mapping[str, Any]) -> Run:
    """Writes adapters, curves and, last, the summary, whose presence says: finished.

    `closing` has the figures of a run that ends early. They are no part of `metrics.jsonl`, which
    so stays that of a run that goes on.
    """
    context, folder, checkpoint, privacy = run.context, run.folder, run.checkpoint, run.privacy
    if checkpoint.best_state:
        save_adapters(context, checkpoint.best_state, folder, "adapter_best")
    save_adapters(context, checkpoint.state, folder, "adapter")
    metrics = folder.read_metrics()
    closing = privacy.shown(closing)
    metrics[-1] |= {key: plain_json(value) for key, value in closing.items()}
    folder.write_bytes("curves.png", curves_png(metrics, metrics[0]["zero_shot_accuracy"]))
    summary = summarise(context, checkpoint, metrics, coverage if privacy.tells_classes else None)
    summary |= privacy.promise() | secure.record_of(context) | hostile.record_of(context)
    if context.several and checkpoint.state.groups:
        summary["adapters"]["merged"] = evaluate_merged(context, folder.path / "adapter")
    summary["adapter_folders"] = adapter_digests(folder)
    summary["seconds"] = sum(line["seconds"] for line in folder.read_timing()) + run.clock.lap()
    privacy.end(folder, summary)
    return Run(folder.path, write_summary(folder, summary))
