"""From a grid to its runs: each cell is one `fedclip run`, named by what it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedclip.config import Config
from fedclip.config.loading import load_config
from fedclip.config.overrides import deep_merge, parse_overrides
from fedclip.config.section import lookup
from fedclip.config.strict_yaml import read_yaml
from fedclip.data.splits import SPLIT_RULE
from fedclip.errors import FedclipWarning, UsageError
from fedclip.experiment.bench.grid import Arm, Grid, load_grid

RATE = "client.learning_rate"


@dataclass(frozen=True)
class Cell:
    """One run of the grid, with the values of its arm's knobs by key."""

    arm: str
    seed: int
    values: Mapping[str, float]
    tuning: bool
    overrides: tuple[str, ...]
    digest: str

    @property
    def name(self) -> str:
        """Name of its run folder; another configuration has another name."""
        return f"{self.arm}-seed{self.seed}-{self.digest}"

    def __str__(self) -> str:
        """What a person calls it."""
        words = [self.arm, f"{'tuning ' if self.tuning else ''}seed {self.seed}"]
        return " ".join([*words, *(f"{short(k)} {v:g}" for k, v in self.values.items())])


@dataclass(frozen=True)
class PlannedArm:
    """An arm at one combination of the grid's factors; `family` is the combination's name."""

    name: str
    overrides: tuple[str, ...]
    knobs: Mapping[str, tuple[float, ...]]
    family: str = ""

    @property
    def tuned(self) -> list[str]:
        """The knobs that are searched; others have one value."""
        return [key for key, values in self.knobs.items() if len(values) > 1]

    @property
    def first_values(self) -> dict[str, float]:
        """The first value of every knob, which shows whether the configuration is valid."""
        return {key: values[0] for key, values in self.knobs.items()}


@dataclass(frozen=True)
class Plan:
    """A grid that is ready to run: its configuration file, and the arms and seeds chosen."""

    grid: Grid
    config: Path
    base: dict[str, Any]  # what the configuration file says
    full: bool = False
    arms: Mapping[str, PlannedArm] = field(default_factory=dict)
    _read: dict[str, Config] = field(default_factory=dict, compare=False, repr=False)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of every arm."""
        return self.grid.seeds

    def references(self, arm: str) -> list[str]:
        """The arms that an arm is compared with: the ones of the same combination of factors."""
        family = self.arms[arm].family
        return [name for r in self.grid.reference if (name := r + family) in self.arms]

    def tuning_cells(self, arm: str, values: Mapping[str, float]) -> list[Cell]:
        """The tuning runs of one choice of values, one for each tuning seed."""
        tuning = self.grid.tuning
        return [self._cell(arm, seed, values, tuning.overrides) for seed in tuning.seeds]

    def cells(self, arm: str, values: Mapping[str, float]) -> list[Cell]:
        """An arm's runs that count, at the chosen values."""
        return [self._cell(arm, seed, values, None) for seed in self.seeds]

    def most_runs(self, arm: str) -> int:
        """The tuning runs that an arm takes, and its seeds."""
        tuning = self.grid.tuning
        return len(self.arms[arm].tuned) * tuning.budget * len(tuning.seeds) + len(self.seeds)

    def problem(self, arm: str, values: Mapping[str, float] | None = None) -> str | None:
        """Why an arm's configuration is refused, at its first or these values; or None."""
        values = self.arms[arm].first_values if values is None else values
        cells = self.tuning_cells(arm, values)[:1] if self.arms[arm].tuned else []
        for cell in (*cells, self.cells(arm, values)[0]):
            try:
                config = self.configuration(cell)
            except UsageError as error:
                return str(error)
            if config.privacy.unit is not None and self.arms[arm].tuned:
                return (
                    f"privacy.unit: tuning {short(self.arms[arm].tuned[0])} would choose by "
                    "validation images of the clients, which the promise does not cover; give one "
                    "value, tuned on other data"
                )
        return None

    def configuration(self, cell: Cell) -> Config:
        """What a cell runs; UsageError where it is refused."""
        if cell.digest not in self._read:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FedclipWarning)
                self._read[cell.digest] = load_config(self.config, cell.overrides)
        return self._read[cell.digest]

    def _cell(
        self, arm: str, seed: int, values: Mapping[str, float], shorter: tuple[str, ...] | None
    ) -> Cell:
        overrides = (
            *self._one_test_set(),
            "evaluation.keep_hits=true",
            *self.grid.overrides,
            *(self.grid.full.overrides if self.full else ()),
            *self.arms[arm].overrides,
            *(shorter or ()),
            *(f"{key}={value!r}" for key, value in values.items()),
            f"seed={seed}",
        )
        tuning = shorter is not None
        return Cell(arm, seed, dict(values), tuning, overrides, self._digest(overrides))

    def _one_test_set(self) -> list[str]:
        """What makes all seeds test on the same images."""
        tasks = self.base.get("tasks")
        homes = [f"tasks.{name}" for name in tasks] if isinstance(tasks, dict) else ["data"]
        return [f"{home}.test_seed={self.grid.test_seed}" for home in homes]

    def _digest(self, overrides: tuple[str, ...]) -> str:
        """Hash of a cell's configuration, so that a changed grid reuses no stale run.

        Defaults are not part of it: finished runs stay valid when fedclip gets another key. The
        rule by which test images are chosen is: runs on other images cannot be compared.
        """
        told = deep_merge(self.base, parse_overrides(overrides)[0]) | {"split": SPLIT_RULE}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def make_plan(
    file: Path,
    *,
    full: bool = False,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Plan:
    """Read a grid file and apply what the command line says.

    `full` takes the grid's `full` part, `only` keeps the arms named, in every combination or in
    one, `seeds` replaces the seeds.
    """
    grid = load_grid(file)
    arms = {arm.name: arm for arm in _planned(grid)}
    for name in only:
        if name not in {*grid.arms, *arms}:
            raise UsageError(f"--only: no arm {name} in {file}; arms: {', '.join(arms)}")
    both = {*grid.tuning.seeds} & {*seeds}
    if both:
        raise UsageError(f"--seeds: {min(both)} is a seed of tuning in {file}")
    chosen = tuple(seeds) or (full and grid.full.seeds) or grid.seeds
    if only:
        kept = {name + end for name in only for end in ("", *grid.combinations())}
        arms = {name: arm for name, arm in arms.items() if name in kept}
    config = Path(os.path.normpath(file.parent / grid.config))
    grid = grid.model_copy(update={"seeds": tuple(dict.fromkeys(chosen))})
    plan = Plan(grid, config, read_yaml(config)[0], full, arms)
    _require_one_test(file, plan)
    return plan


_JUDGED_BY = (
    *("data.name", "data.path", "data.class_names", "data.test_fraction", "data.test_sites"),
    *("data.test_seed", "data.shots", "data.train_classes", "evaluation.max_examples"),
)


def _require_one_test(file: Path, plan: Plan) -> None:
    """Refuses arms that would be judged on different images: their figures say nothing."""
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, arm in plan.arms.items():
        if plan.problem(name) is not None:
            continue  # it is left out, and says why
        values = plan.configuration(plan.cells(name, arm.first_values)[0]).model_dump()
        judged = {key: lookup(values, key) for key in _JUDGED_BY}
        other, theirs = first.setdefault(arm.family, (name, judged))
        for key in _JUDGED_BY:
            if judged[key] != theirs[key]:
                raise UsageError(
                    f"{file}: arms {other} and {name} cannot be compared: {key} is {theirs[key]!r} "
                    f"for one and {judged[key]!r} for the other; set it in `overrides`, for all"
                )


def short(key: str) -> str:
    """What tables call a knob."""
    return "lr" if key == RATE else key.removeprefix("federation.").removeprefix("client.")


def _planned(grid: Grid) -> list[PlannedArm]:
    def planned(name: str, arm: Arm, end: str, factors: tuple[str, ...]) -> PlannedArm:
        return PlannedArm(name + end, (*factors, *arm.overrides), grid.knobs(arm), end)

    return [
        planned(name, arm, end, factors)
        for end, factors in grid.combinations().items()
        for name, arm in grid.arms.items()
    ]
