"""From a grid to its runs: each cell is one `fedclip run`, named by what it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedclip.config.loading import load_config
from fedclip.config.overrides import deep_merge, parse_overrides
from fedclip.config.strict_yaml import read_yaml
from fedclip.data.splits import SPLIT_RULE
from fedclip.errors import FedclipWarning, UsageError
from fedclip.experiment.bench.grid import Arm, Grid, load_grid


@dataclass(frozen=True)
class Cell:
    """One run of the grid. `rate` is None where the configuration's own is kept."""

    arm: str
    seed: int
    rate: float | None
    tuning: bool
    overrides: tuple[str, ...]
    digest: str

    @property
    def name(self) -> str:
        """Name of its run folder; another configuration has another name."""
        rate = "" if self.rate is None else f"-lr{self.rate:g}"
        return f"{self.arm}-seed{self.seed}{rate}-{self.digest}"

    def __str__(self) -> str:
        """What a person calls it."""
        words = [self.arm, "tuning" if self.tuning else f"seed {self.seed}"]
        return " ".join([*words, f"lr {self.rate:g}"] if self.rate is not None else words)


@dataclass(frozen=True)
class Plan:
    """A grid that is ready to run: its configuration file, and the arms and seeds chosen."""

    grid: Grid
    config: Path
    base: dict[str, Any]  # what the configuration file says
    full: bool = False

    @property
    def arms(self) -> dict[str, Arm]:
        """The arms of this plan."""
        return self.grid.arms

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of every arm."""
        return self.grid.seeds

    def rates(self, arm: str) -> tuple[float | None, ...]:
        """Learning rates of an arm, ascending; one that is None leaves the configuration's."""
        own = self.arms[arm].rates
        return tuple(sorted(set(self.grid.tuning.rates if own is None else own))) or (None,)

    def tuning_cells(self, arm: str) -> list[Cell]:
        """The runs that choose an arm's rate; none where there is nothing to choose."""
        rates, tuning = self.rates(arm), self.grid.tuning
        if len(rates) == 1:
            return []
        return [self._cell(arm, tuning.seed, rate, tuning.overrides) for rate in rates]

    def cells(self, arm: str, rate: float | None) -> list[Cell]:
        """An arm's runs that count, at the chosen rate."""
        return [self._cell(arm, seed, rate, None) for seed in self.seeds]

    def problem(self, arm: str) -> str | None:
        """Why an arm's configuration is refused, or None."""
        rate = self.rates(arm)[0]
        for cell in [*self.tuning_cells(arm)[:1], self.cells(arm, rate)[0]]:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FedclipWarning)
                    load_config(self.config, cell.overrides)
            except UsageError as error:
                return str(error)
        return None

    def _cell(
        self, arm: str, seed: int, rate: float | None, shorter: tuple[str, ...] | None
    ) -> Cell:
        rates = () if rate is None else (f"client.learning_rate={rate!r}",)
        overrides = (
            *self.grid.overrides,
            *(self.grid.full.overrides if self.full else ()),
            *self.arms[arm].overrides,
            *(shorter or ()),
            *rates,
            f"seed={seed}",
        )
        return Cell(arm, seed, rate, shorter is not None, overrides, self._digest(overrides))

    def _digest(self, overrides: tuple[str, ...]) -> str:
        """Hash of what the run is told, so that a changed grid takes no old run for its own.

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

    `full` takes the grid's `full` part, `only` keeps the arms named, `seeds` replaces the seeds.
    """
    grid = load_grid(file)
    unknown = [name for name in only if name not in grid.arms]
    if unknown:
        raise UsageError(
            f"--only: no arm {', '.join(unknown)} in {file}; arms: {', '.join(grid.arms)}"
        )
    if grid.tuning.seed in seeds:
        raise UsageError(f"--seeds: {grid.tuning.seed} is the seed of tuning in {file}")
    chosen = tuple(seeds) or (full and grid.full.seeds) or grid.seeds
    arms = {name: arm for name, arm in grid.arms.items() if not only or name in only}
    config = Path(os.path.normpath(file.parent / grid.config))
    grid = grid.model_copy(update={"seeds": tuple(dict.fromkeys(chosen)), "arms": arms})
    return Plan(grid, config, read_yaml(config)[0], full)
