"""Runs from Python: in-memory data, user-defined strategy classes, and the finished run.

`fedclip.run`, `fedclip.resume` and `fedclip.evaluate` are these functions.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedclip.catalog import GIVEN, is_given, short_name
from fedclip.config import Config
from fedclip.config.loading import config_from_dict, load_config
from fedclip.config.lookup import giving
from fedclip.config.section import lookup
from fedclip.data.sources.memory import in_memory
from fedclip.errors import UsageError, shortened
from fedclip.experiment import run as experiment
from fedclip.experiment.folder import CONFIG, REPORT, RunFolder, next_folder
from fedclip.federated.strategies import Setting, Strategy
from fedclip.reports.curves import curves
from fedclip.reports.listener import Heard, Listener

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_BY_CLIENT = ("clients", "weights")
"""Figures by client in a round's record, besides those whose names end in `_by_client`."""


@dataclass(frozen=True)
class Run(experiment.Run):
    """A finished run: its folder, its figures (`summary.json`), and views of them."""

    @property
    def metrics(self) -> DataFrame:
        """The figures by round, one row each, without those by client."""
        import pandas

        lines = [
            {k: v for k, v in line.items() if k not in _BY_CLIENT and not k.endswith("_by_client")}
            for line in self._lines()
        ]
        return pandas.json_normalize(lines)

    @property
    def best(self) -> dict[str, Any] | None:
        """The record of the best round by validation, the earliest of equals; None without any."""
        scored = [r for r in self._lines()[1:] if r.get("validation_accuracy") is not None]
        return max(scored, key=lambda record: record["validation_accuracy"], default=None)

    def plot(self) -> Figure:
        """Loss and accuracy by round as a matplotlib figure, which a notebook shows."""
        return curves(self._lines(), self.summary.get("zero_shot_accuracy"))

    def predict(
        self, images: Any, labels: Sequence[str] | None = None, *, best: bool = False
    ) -> list[dict[str, Any]]:
        """Classifies paths, PIL images or arrays; see `fedclip.predict`."""
        from fedclip.adapters.predict import predict

        return predict(self.folder, images, labels, best=best)

    def _lines(self) -> list[dict[str, Any]]:
        return RunFolder(self.folder).read_metrics()

    def _repr_html_(self) -> str:
        """The main figures, and where everything is, for a notebook."""
        found, best = self.summary, self.best
        rows = {
            "accuracy": _percent(found.get("accuracy")),
            "zero-shot accuracy": _percent(found.get("zero_shot_accuracy")),
            "best round by validation": None if best is None else best["server_round"],
            "rounds": found.get("rounds"),
            "stopped by": found.get("stopped_by"),
            "strategy": short_name(found.get("strategy", "")) or None,
            "clients": found.get("clients"),
            "folder": self.folder,
            "report": self.folder / REPORT if (self.folder / REPORT).is_file() else None,
        }
        cells = (
            f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
            for name, value in rows.items()
            if value is not None
        )
        return f"<table>{''.join(cells)}</table>"


def run(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    data: Any = None,
    strategy: str | type[Strategy] | Strategy | None = None,
    output: str | Path | None = None,
    listener: Heard | Sequence[Heard] | None = None,
) -> Run:
    """Runs a configuration, given as a tree, a dictionary or a YAML file, into a new folder.

    `data` takes the place of the data set that the configuration names: a `datasets.Dataset` or
    `DatasetDict`, or a dictionary with `images`, `labels` and `class_names` (see
    the page on Python). `strategy` takes that of `federation.strategy`: a name, or a
    class that extends `fedclip.Strategy`, or an object of one, which may also stand in the
    dictionary.

    `output` is the run folder, by default the next free one under `runs/`. A listener, or several,
    hear of the run's events, and a function of each round's record; what they raise ends it, and
    the last finished round is kept. Raises UsageError for anything that the user can mend, before
    the folder is made.
    """
    if output is None and isinstance(config, str | Path):
        output = next_folder(Path(config).stem)
    named, context = _named(config, data, strategy)
    with context:
        return _shown(experiment.run(named, output=output, listener=listener))


def resume(
    folder: str | Path,
    *,
    data: Any = None,
    strategy: type[Strategy] | Strategy | None = None,
    listener: Heard | Sequence[Heard] | None = None,
) -> Run:
    """Goes on with a run that was stopped; a finished one is returned as it is.

    One that a listener has ended early goes on to the last round of its configuration. What was
    handed over to `run` as `data` or `strategy` is handed over again, and must be the same.
    """
    with _again(folder, data, strategy):
        return _shown(experiment.resume(folder, listener=listener))


def evaluate(
    folder: str | Path,
    *,
    data: Any = None,
    listener: Listener | None = None,
    detail: bool = False,
    best: bool = False,
) -> dict[str, Any]:
    """Evaluates a finished run's adapter again, on the central test set and by client.

    It is the last round's, or with `best` that of the best round by validation. `data` is what was
    handed over to `run`, where the run has no data set of another name. With `detail` the figures
    hold one more, `detail`: by class, site and confidence, beside the base model
    (`fedclip.evaluation.breakdown`). Of several tasks, `adapters` has the accuracy of every
    adapter on every task.
    """
    from fedclip.adapters import inspect  # which imports far more than a run needs

    with _again(folder, data, None):
        return inspect.evaluate(folder, listener=listener, detail=detail, best=best)


def _named(
    config: Config | Mapping[str, Any] | str | Path, data: Any, strategy: Any
) -> tuple[Config | Mapping[str, Any] | str | Path, AbstractContextManager[None]]:
    """A configuration with names for what is handed over, and a context that knows it."""
    inside = _strategy_in(config)
    if inside is not None and strategy is not None:
        raise UsageError("strategy is given twice: as strategy= and as federation.strategy")
    strategy = inside if strategy is None else strategy
    if data is None and strategy is None:
        return config, giving({})
    values = dict(config) if isinstance(config, Mapping) else experiment.as_config(config)
    values = values.model_dump(mode="json") if isinstance(values, Config) else values
    if data is not None:
        if values.get("tasks"):
            raise UsageError("data stands for a single data set, but the configuration has tasks")
        values["data"] = _with(values, "data", name=GIVEN)
        path = lookup(values, "data.path")
        if path is not None:
            raise UsageError(
                f"data.path: {path} names a data set, and data= hands over another; leave one of "
                "them out"
            )
    if strategy is not None:
        values["federation"] = _with(values, "federation", strategy=_name_of(strategy))
    with warnings.catch_warnings():
        if not isinstance(config, Mapping):
            warnings.simplefilter("ignore")  # which as_config has given
        tree = config_from_dict(values, str(config) if isinstance(config, str | Path) else "config")
    return tree, _giving(data, None if isinstance(strategy, str) else strategy)


def _strategy_in(config: Any) -> Any:
    """The strategy in a dictionary, where it is no name."""
    section = config.get("federation") if isinstance(config, Mapping) else None
    found = section.get("strategy") if isinstance(section, Mapping) else None
    return None if isinstance(found, str) else found


def _with(values: Mapping[str, Any], section: str, **changes: Any) -> Any:
    """A section with other values; one that is no mapping stays, and is refused with the rest."""
    found = values.get(section, {})
    return {**found, **changes} if isinstance(found, Mapping) else found


def _name_of(strategy: Any) -> str:
    """The name that stands for a strategy in `config.yaml`; UsageError for what is none."""
    if isinstance(strategy, str):
        return strategy
    own = strategy if isinstance(strategy, type) else type(strategy)
    if not issubclass(own, Strategy):
        raise UsageError(
            "strategy must be a name, a class that extends fedclip.Strategy, or an object of one, "
            f"got {shortened(strategy)}"
        )
    if own is not strategy and getattr(strategy, "setting", Setting()) != Setting():
        raise UsageError(
            f"strategy: {own.__name__} was made with a Setting, but the run sets its own; make it "
            "without one"
        )
    return f"{GIVEN}:{re.sub(r'[^0-9A-Za-z_]', '_', own.__name__)}"


def _again(folder: str | Path, data: Any, strategy: Any) -> AbstractContextManager[None]:
    """A context for a run folder with what it was begun with, where it has names for that."""
    if data is None and strategy is None:
        return giving({})
    config = load_config(RunFolder.open(Path(folder)).path / CONFIG)
    if data is not None and not is_given("data_sets", config.data.name):
        raise UsageError(f"data: {folder} has data.name: {config.data.name}; leave data= out")
    named = config.federation.strategy
    if strategy is not None and _name_of(strategy) != named:
        raise UsageError(f"strategy: {folder} was begun with {named}, got {_name_of(strategy)}")
    return _giving(data, strategy)


def _giving(data: Any, strategy: Any) -> AbstractContextManager[None]:
    objects = {} if strategy is None else {"strategies": strategy}
    if data is not None:
        source = in_memory(data)
        objects["data_sets"] = lambda path, layout: source
    return giving(objects)


def _shown(found: experiment.Run) -> Run:
    return Run(found.folder, found.summary)


def _percent(share: Any) -> str | None:
    return f"{share:.1%}" if isinstance(share, int | float) else None
