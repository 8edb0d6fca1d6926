"""The coordinator: starts Flower's server and the run on it, and goes on after whatever happens.

The rounds are in a process of Flower's (`rounds.py`); what it has finished is in the run folder.
So a coordinator that is killed is started again by the same command, and a server that is killed
is started again by the coordinator: each time a new run of Flower's goes on from the last round.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedclip.config import Config
from fedclip.config.attack import require_no_attack
from fedclip.config.loading import dump_config, load_config
from fedclip.config.secure import LEAST_MASKED, few
from fedclip.deploy.addresses import Address
from fedclip.deploy.app_code import APP
from fedclip.deploy.coordinator import registry
from fedclip.deploy.coordinator.control import Control
from fedclip.deploy.coordinator.run_files import DeployFiles
from fedclip.deploy.flower.commands import superlink
from fedclip.deploy.flower.supervisor import START_PATIENCE, Supervised, listening
from fedclip.deploy.keys import folder as keys
from fedclip.errors import FedclipError, UsageError
from fedclip.experiment.build import with_absolute_paths
from fedclip.experiment.folder import CONFIG, METRICS, RunFolder
from fedclip.experiment.privacy_checks import require_at_sites
from fedclip.experiment.run import Run
from fedclip.experiment.summary_file import read_summary
from fedclip.reports.trackers.tracking import tracker_classes

LOOK_EVERY = 0.5
RESTART_PATIENCE = 10.0
FRUITLESS = 3
"""How many of Flower's runs may end without a finished round before the coordinator gives up."""


def coordinate(config: Config, folder: Path, say: Callable[[str], None]) -> Run:
    """Carries a run out over its sites, or goes on with the one that is in the folder.

    `say` gets lines of progress. Raises UsageError for what the user can mend, and what stopped
    the rounds otherwise.
    """
    require_at_sites(config)
    require_no_attack(config, "fedclip coordinate")
    require_keys(config)
    tracker_classes(config)
    config = with_absolute_paths(config)
    run = _take_up(config, folder)
    if not run.has_rounds_left():
        say(f"{folder} is finished; there is nothing left to do")
        return Run(run.path, read_summary(run))
    files = DeployFiles(run.path.absolute())
    files.create()
    address = Address.parse(config.deploy.address, "deploy.address")
    key_folder = None if config.deploy.keys is None else Path(config.deploy.keys)
    if key_folder is not None:
        keys.check_coordinator(key_folder)
    command = superlink(
        address,
        files.flower / "home",
        files.flower / "state.db",
        key_folder,
        int(config.deploy.largest_message_mb * 1e6),
    )
    ready = listening(address, command.authority)
    link = Supervised(command, files.flower / "superlink.log", ready, say=say)
    with _app() as app, link, _relayed(files, say) as relay:
        return _until_finished(run, files, link, address.from_here, key_folder, app, relay, say)


def require_keys(config: Config) -> None:
    """Refuse masks without the sites' keys, or with fewer sites than a sum hides one among."""
    if not config.secure.masked:
        return
    if config.deploy.keys is None:
        raise UsageError(
            "deploy.keys: secure.aggregation: masked needs keys of the sites, by which they know "
            "each other; `fedclip keys init`, `keys site` and `keys peers` make them"
        )
    names = config.deploy.sites or keys.site_names(Path(config.deploy.keys))
    if 0 < len(names) < LEAST_MASKED:
        raise UsageError(few("deploy.sites", len(names)))


def _take_up(config: Config, folder: Path) -> RunFolder:
    """The run in a folder, which must be of this configuration, or a new one."""
    run = RunFolder(folder)
    if not run.is_run():
        return RunFolder.create(folder, dump_config(config))
    if load_config(folder / CONFIG) != config:
        raise UsageError(
            f"{folder} holds a run of another configuration; go on with that one "
            f"({folder / CONFIG}), or choose another --output"
        )
    return RunFolder.open(folder)


def _until_finished(
    run: RunFolder,
    files: DeployFiles,
    link: Supervised,
    address: Address,
    key_folder: Path | None,
    app: Path,
    relay: Callable[[], None],
    say: Callable[[str], None],
) -> Run:
    """Starts runs of Flower's until one has come to the end."""
    fruitless, before = 0, _progress_of(run)
    while True:
        files.forget_failure()
        if not link.wait(START_PATIENCE):
            raise FedclipError(
                f"Flower's server is not ready after {START_PATIENCE:g} s; its log: {link.log}"
            )
        starts = link.starts
        try:
            with Control(address, link.command.authority) as control:
                if key_folder is not None:
                    for text in registry.register_all(control, key_folder):
                        say(text)
                number = control.start_run(app, {"folder": str(run.path.absolute())})
                _watch(control, number, run, link, starts, relay)
        except FedclipError as error:
            link.check()
            say(f"the connection to Flower's server was lost: {error}")
            _wait_for_another_start(link, starts)
        relay()
        if run.is_finished():
            return Run(run.path, read_summary(run))
        failure = files.failure()
        if failure is not None:
            raise failure
        after = _progress_of(run)
        fruitless = 0 if after != before else fruitless + 1
        before = after
        if fruitless >= FRUITLESS:
            raise FedclipError(
                f"{FRUITLESS} runs of Flower's have ended without a finished round; its log: "
                f"{link.log}, and {files.progress}"
            )
        say("the rounds broke off; going on from the last finished one")


def _watch(
    control: Control,
    number: int,
    run: RunFolder,
    link: Supervised,
    starts: int,
    relay: Callable[[], None],
) -> None:
    """Returns when a run of Flower's has ended, or its server has been started again."""
    while link.starts == starts:
        relay()
        link.check()
        if control.run_status(number)[0] == "finished":
            return
        time.sleep(LOOK_EVERY)


def _wait_for_another_start(link: Supervised, starts: int) -> None:
    """Waits a while for a killed server to be started again, which still counts as ready."""
    end = time.monotonic() + RESTART_PATIENCE
    while link.starts == starts and time.monotonic() < end:
        link.check()
        time.sleep(LOOK_EVERY)


def _progress_of(run: RunFolder) -> int:
    path = run.path / METRICS
    return path.stat().st_size if path.exists() else 0


@contextmanager
def _app() -> Iterator[Path]:
    """The app's folder, copied out of the installed package for Flower to send."""
    with tempfile.TemporaryDirectory(prefix="fedclip-app-") as place:
        target = Path(place) / "app"
        shutil.copytree(APP, target, ignore=shutil.ignore_patterns("__pycache__"))
        yield target


@contextmanager
def _relayed(files: DeployFiles, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """A function that says what has been added to the log of progress since it was last called."""
    files.progress.touch()
    with files.progress.open(encoding="utf-8") as file:
        file.seek(0, 2)

        def relay() -> None:
            for line in file.read().splitlines():
                if line:
                    say(line)

        yield relay
