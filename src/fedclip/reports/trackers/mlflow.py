"""MLflow: a data base in the run folder, or the server that `MLFLOW_TRACKING_URI` names."""

from __future__ import annotations

import logging
import os
import re
import socket
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from fedclip.reports.trackers.tracker import Tracker, settings_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

_EXPERIMENT = "fedclip"
_KEY, _ROUND = "fedclip.run", "server_round"
_MOST_METRICS, _MOST_SETTINGS, _LONGEST = 1000, 100, 500  # of one request
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_FORBIDDEN = re.compile(r"[^\w.\- /]")


class MLflow(Tracker):
    """Logs into the experiment `fedclip`, or `MLFLOW_EXPERIMENT_NAME`, by MLflow's client."""

    packages: ClassVar[tuple[str, ...]] = ("mlflow", "sqlalchemy", "alembic")
    extra: ClassVar[str] = "mlflow"
    _client: MlflowClient
    _run: str

    @property
    def place(self) -> str:
        """MLflow's address of the store."""
        own = f"sqlite:///{self.run.folder.absolute() / 'mlflow.db'}"
        return os.environ.get("MLFLOW_TRACKING_URI") or own

    @property
    def server(self) -> str | None:
        """The store's address, where it is a server's, be it of a data base."""
        scheme = urlsplit(self.place).scheme
        return None if scheme in ("", "sqlite", "file") else self.place

    def ask_server(self) -> None:
        """Asks a data base's server by its port, and none of which neither is known."""
        parts = urlsplit(self.place)
        if parts.scheme in ("http", "https"):
            super().ask_server()
            return
        port = parts.port or _PORTS.get(parts.scheme.partition("+")[0])
        if parts.hostname and port:
            socket.create_connection((parts.hostname, port), timeout=2.0).close()
        self.answered = True

    def load(self) -> None:
        """Imports MLflow, which tells nobody that it is used."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # One try, for a tracker is asked again after the next round.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        warnings.filterwarnings("ignore", module=r"mlflow\.")
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)

    def open(self) -> int:
        """Finds the run by its key, or begins one."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(tracking_uri=self.place)
        experiment = self._experiment()
        found = self._client.search_runs([experiment], f"tags.`{_KEY}` = '{self.run.key}'")
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._client.create_run(
                experiment,
                start_time=int(self.run.began * 1000),
                tags={_KEY: self.run.key},
                run_name=self.run.folder.name,
            ).info.run_id
        settings = [Param(_key(k), v[:_LONGEST]) for k, v in settings_of(self.run.config).items()]
        if not found or not found[0].data.params:
            for first in range(0, len(settings), _MOST_SETTINGS):
                self._client.log_batch(self._run, params=settings[first : first + _MOST_SETTINGS])
        history = self._client.get_metric_history(self._run, _ROUND) if found else []
        return max((metric.step for metric in history), default=-1)

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _EXPERIMENT
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)

    def log(self, server_round: int, figures: Mapping[str, float], at: float) -> None:
        """Logs the figures and, last, the round's number, by which a resumed run knows it whole.

        What is logged twice of a round that was cut off has the same time, and is one row.
        """
        from mlflow.entities import Metric

        def metric(name: str, value: float) -> Any:
            return Metric(_key(name), value, int(at * 1000), server_round)

        metrics = [metric(name, value) for name, value in figures.items()]
        metrics.append(metric(_ROUND, server_round))
        for first in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._run, metrics=metrics[first : first + _MOST_METRICS])

    def close(self, finished: bool) -> None:
        """Ends MLflow's run."""
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")


def _key(name: str) -> str:
    """A name that MLflow takes, different for different names."""
    return _FORBIDDEN.sub(lambda found: f"_{ord(found[0]):x}_", name)[:250]
