"""Weights & Biases: a run in the run folder, for `wandb sync`; sent at once where that is set."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any, ClassVar

from fedclip.reports.trackers.tracker import Tracker

_PROJECT = "fedclip"
_ONLINE = ("online", "shared")
_OLD = {"run": "online", "dryrun": "offline", "": "offline"}  # names of older versions, and none
_PATIENCE = 30  # seconds for the server that has answered once


class WandB(Tracker):
    """Logs offline, unless `WANDB_MODE=online` is set and the server answers.

    An offline run is written anew on resume, from the run's own lines.
    """

    packages: ClassVar[tuple[str, ...]] = ("wandb",)
    extra: ClassVar[str] = "wandb"
    _run: Any
    _unanswered = False

    @property
    def place(self) -> str:
        """The folder of W&B's files, and the server, if it is to be sent there."""
        folder = str(self.run.folder / "wandb")
        return f"{folder} and {self.server}" if self.server else folder

    @property
    def server(self) -> str | None:
        """W&B's address, where figures are sent as they come."""
        if self._unanswered or _mode() not in _ONLINE:
            return None
        return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"

    def load(self) -> None:
        """Imports W&B, which tells nobody of its errors."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # noqa: F401

    def ask_server(self) -> None:
        """Falls back to files where the server does not answer."""
        try:
            super().ask_server()
        except OSError as error:
            self._unanswered = True
            self.notes.append(f"{error}; logging offline, for `wandb sync`")

    def open(self) -> int:
        """Begins the run, or goes on with that of the server."""
        online = self.server is not None
        mode = "offline" if self._unanswered else _mode()
        folder = self.run.folder / "wandb"
        if not online:
            for old in folder.glob(f"offline-run-*-{self.run.key}"):
                shutil.rmtree(old)
        self._run = self._init(mode, resume="allow" if online else None)
        return int(self._run.starting_step) - 1 if online else -1

    def _init(self, mode: str, resume: str | None) -> Any:
        import wandb

        return wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            id=self.run.key,
            name=self.run.folder.name,
            dir=self.run.folder,
            config=dict(self.run.config),
            mode=mode,  # type: ignore[arg-type]
            resume=resume,  # type: ignore[arg-type]
            reinit="create_new",
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
                x_disable_meta=True,
                x_save_requirements=False,
                init_timeout=_PATIENCE,
                finish_timeout=_PATIENCE,
            ),
        )

    def log(self, server_round: int, figures: Mapping[str, float], at: float) -> None:
        """Logs the figures as one step."""
        self._run.log({**figures, "server_round": server_round}, step=server_round)

    def close(self, finished: bool) -> None:
        """Ends W&B's run; what is there of it offline is complete then."""
        self._run.finish(exit_code=0 if finished else 1)


def _mode() -> str:
    """What `WANDB_MODE` asks for; offline where it asks for nothing."""
    mode = os.environ.get("WANDB_MODE", "")
    return _OLD.get(mode, mode)
