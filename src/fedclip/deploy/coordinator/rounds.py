"""The rounds of a run over several machines, in the process that Flower starts for them.

It is a run like any other (`experiment.carry_out`), with an engine whose clients are elsewhere.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedclip.config import Config
from fedclip.config.loading import load_config
from fedclip.deploy.coordinator.context import coordinator_context, expected_sites
from fedclip.deploy.coordinator.engine import remote_engine
from fedclip.deploy.coordinator.provenance import begin_log, signed_statement, signer_of
from fedclip.deploy.coordinator.run_files import DeployFiles
from fedclip.deploy.flower.mail import FlowerMail
from fedclip.deploy.flower.process import LOOK_EVERY
from fedclip.deploy.job import EPSILON, make_job
from fedclip.deploy.keys.folder import site_names
from fedclip.deploy.log.adapter_statement import seal_folder
from fedclip.deploy.log.verify import COORDINATOR
from fedclip.deploy.remote.engine import Mail, Patience, Roster, Traffic
from fedclip.device import return_freed_memory
from fedclip.errors import FedclipError, FedclipWarning, TrainingFailed, UsageError
from fedclip.evaluation.metrics import chosen
from fedclip.evaluation.per_client import told_by_clients
from fedclip.experiment.class_coverage import check_measurable
from fedclip.experiment.folder import RunFolder
from fedclip.experiment.privacy_checks import check_privacy
from fedclip.experiment.run import Run, carry_out
from fedclip.experiment.secure import check_secure
from fedclip.experiment.strategy import choose_strategy, is_personal
from fedclip.federated.rounds import RoundResult
from fedclip.models.summary import base_sha256
from fedclip.reports.progress import PlainProgress

if TYPE_CHECKING:
    from flwr.serverapp import Grid

LOCK_PATIENCE = 60.0
"""Seconds until the process of a killed coordinator has let go of the run folder."""


def carry(grid: Grid, folder: Path) -> None:
    """Goes through the rounds of the run in a folder; a failure is written there."""
    threading.Thread(target=_end_alone, args=(os.getppid(),), daemon=True).start()
    files = DeployFiles(folder)
    config = load_config(folder / "config.yaml")
    try:
        with files.progress.open("a", encoding="utf-8", buffering=1) as file:
            console = Console(file=file, highlight=False, soft_wrap=True, width=200)
            listener = DeployProgress(console, files)
            # A message outlives its round, so that a slow answer is named as one.
            mail = FlowerMail(grid, ttl=2 * config.deploy.round_deadline + 600)
            rounds(config, RunFolder.open(folder), files, mail, listener)
    except FedclipError as error:
        files.fail(error)
        raise
    except Exception as error:
        files.say("".join(traceback.format_exception(error)))
        raise


class DeployProgress(PlainProgress):
    """Lines of progress in a file, and the bytes of each round in another."""

    def __init__(self, console: Console, files: DeployFiles) -> None:
        super().__init__(console)
        self._files = files
        self.traffic = Traffic()
        self._before = Traffic()

    def partition(self, class_names: Any, counts: Any) -> None:
        """Nothing: class counts stay at the sites."""

    def round(self, record: Mapping[str, Any]) -> None:
        """Writes the round's figures, and what it has sent and received."""
        super().round({**record, "left_out": ()})  # which the engine has told
        up, down = self.traffic.up - self._before.up, self.traffic.down - self._before.down
        self._before = Traffic(self.traffic.up, self.traffic.down)
        line = {"server_round": record["server_round"], "up": up, "down": down}
        if self.traffic.results:
            line["results"] = self.traffic.results
        self._files.note_bytes(line)


def rounds(
    config: Config, folder: RunFolder, files: DeployFiles, mail: Mail, listener: DeployProgress
) -> Run:
    """Waits for the sites, and trains with them until the last round; warnings become messages."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", FedclipWarning)
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, FedclipWarning):
                listener.message(f"warning: {message}")
            else:
                usual(message, category, *place, **more)

        warnings.showwarning = show
        return _rounds(config, folder, files, mail, listener)


def _rounds(
    config: Config, folder: RunFolder, files: DeployFiles, mail: Mail, listener: DeployProgress
) -> Run:
    started, deploy = time.perf_counter(), config.deploy
    return_freed_memory()
    _wait_for_lock(folder)
    keyed = site_names(Path(deploy.keys)) if deploy.keys else []
    wanted, count = expected_sites(config, keyed)
    examples = dict.fromkeys(sorted(wanted or ()), 0) | files.sites
    context = coordinator_context(config, listener, examples)
    check_measurable(context, is_personal(config))
    job = make_job(config, context.data.class_names, context.data.templates)
    base = base_sha256(context.model)
    largest = int(deploy.largest_message_mb * 1e6)
    roster = Roster(
        mail,
        files.run,
        job,
        base,
        largest,
        listener.message,
        wanted,
        examples,
        on_admit=lambda: files.keep_sites(examples),
        journal=begin_log(config, files, job, base),
    )
    patience = Patience(
        deploy.quorum,
        config.robust.least,
        deadline=deploy.round_deadline,
        attempts=deploy.attempts,
    )
    _gather(roster, patience, count, deploy.join_deadline, listener)
    engine = remote_engine(context, files, mail, roster, patience, listener, listener.traffic)
    strategy = choose_strategy(context)
    check_secure(context, choose_strategy)
    check_privacy(context, choose_strategy)

    signed: dict[str, Any] = {}

    def judge(result: RoundResult) -> dict[str, Any]:
        signed.update(signed_statement(config, files, roster, result.state))
        found = engine.give_results(result.state, result.server_round, signed)
        counts = {site: (own.tests, own.correct) for site, own in found.items()}
        names = chosen(config.evaluation.metrics)
        return told_by_clients(counts, context.clients, strategy.personal, names)

    run = carry_out(context, strategy, folder, listener, started, engine, judge)
    told = {key: run.summary.get(key) for key in ("rounds", "adapter_sha256", "state_sha256")}
    head = roster.journal.note("ended", **told, epsilon=job[EPSILON])
    if signed and head is not None:
        seal_folder(run.adapter, signed, COORDINATOR, signer_of(config, files), head)
    return run


def _gather(
    roster: Roster, patience: Patience, count: int, deadline: float, listener: DeployProgress
) -> None:
    """Waits until all sites are there, or for so long; raises without a quorum."""
    listener.message(f"waiting for {count} sites")
    roster.greet(time.monotonic() + deadline, lambda: len(roster.nodes) >= count)
    here = sorted(roster.nodes)
    missing = sorted((roster.wanted or set()) - set(here))
    if len(here) < patience.needed(count):
        raise TrainingFailed(
            f"{len(here)} of {count} sites have come within {deadline:g} s "
            f"(deploy.join_deadline), {patience.needed(count)} are needed"
            + (f"; missing: {', '.join(missing)}" if missing else "")
        )
    if missing:
        listener.message(f"beginning without {', '.join(missing)}, who may come later")


def _wait_for_lock(folder: RunFolder) -> None:
    end = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            with folder.exclusive():
                return
        except UsageError:
            if time.monotonic() >= end:
                raise
            time.sleep(LOOK_EVERY)


def _end_alone(parent: int) -> None:
    """Ends this process at once when the one that started it is gone: another takes its place."""
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY)
    os._exit(1)
