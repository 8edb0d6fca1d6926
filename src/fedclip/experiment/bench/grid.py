"""The grid file: which arms are compared, on which configuration, seeds and learning rates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from fedclip.config.section import AsTuple, Rate, Section, Seed, Text
from fedclip.config.strict_yaml import read_yaml
from fedclip.errors import UsageError

Override = Annotated[Text, Field(pattern=r"^[^=\s]+=")]
Overrides = Annotated[tuple[Override, ...], AsTuple]
Rates = Annotated[tuple[Rate, ...], AsTuple]
Seeds = Annotated[tuple[Seed, ...], AsTuple]
# It becomes part of a folder's name.
ArmName = Annotated[str, Field(max_length=100, pattern=r"^\w[\w.+-]*$")]


class Tuning(Section):
    """How an arm's learning rate is chosen: by validation accuracy, on a seed of its own."""

    seed: Seed = Field(100, description="Seed of the tuning runs; none of `seeds`.")
    overrides: Overrides = Field((), description="What makes a tuning run shorter.")
    rates: Rates = Field((), description="Rates that arms without their own try.")


class Arm(Section):
    """What is compared: one way to run the configuration."""

    overrides: Overrides = Field((), description="What differs from the other arms.")
    rates: Rates | None = Field(
        None, description="Learning rates to try; one is taken as it is; `null`: `tuning.rates`."
    )


class Full(Section):
    """What `--full` changes."""

    seeds: Seeds | None = Field(None, min_length=1, description="Seeds in the place of `seeds`.")
    overrides: Overrides = Field((), description="Laid over `overrides`.")


class Grid(Section):
    """A whole comparison."""

    config: Text = Field(description="Configuration of all runs; beside the grid file.")
    overrides: Overrides = Field((), description="What all arms change of it.")
    seeds: Seeds = Field((0, 1, 2), min_length=1, description="Every arm runs each of them.")
    tuning: Tuning = Field(Tuning(), description="Choice of the learning rate.")
    arms: dict[ArmName, Arm] = Field(min_length=1, description="Arms by name.")
    reference: Annotated[tuple[Text, ...], AsTuple] = Field(
        (), description="Arms from which the others' paired differences are shown."
    )
    full: Full = Field(Full(), description="What `--full` changes.")

    @field_validator("reference", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("arms", mode="before")
    @classmethod
    def _empty_arms(cls, value: Any) -> Any:
        """`name:` with nothing behind it is the configuration as it stands."""
        return {k: v or {} for k, v in value.items()} if isinstance(value, dict) else value


_SECTIONS: dict[str, type[Section]] = {"tuning": Tuning, "full": Full, "arms": Arm}


def load_grid(path: Path) -> Grid:
    """Read a grid file; a UsageError lists everything that is wrong with it."""
    values, lines = read_yaml(path)
    try:
        grid = Grid.model_validate(values)
    except ValidationError as error:
        found = [_sentence(detail["loc"], detail, lines) for detail in error.errors()]
        raise UsageError(_listed(path, found)) from None
    found = _problems(grid)
    if found:
        raise UsageError(_listed(path, found))
    return grid


def _problems(grid: Grid) -> list[str]:
    """What single keys do not show."""
    known = ", ".join(grid.arms)
    unknown = [name for name in grid.reference if name not in grid.arms]
    found = [f"reference: no arm {name!r}; arms: {known}" for name in unknown]
    seeds = {*grid.seeds, *(grid.full.seeds or ())}
    if grid.tuning.seed in seeds:
        found.append(
            f"tuning.seed: {grid.tuning.seed} is one of the seeds that are compared; choose "
            "another, so that no rate is chosen on what it is judged by"
        )
    return found


def _sentence(loc: tuple[int | str, ...], detail: Any, lines: dict[str, int]) -> str:
    # pydantic marks a bad key of a mapping by a last part "[key]".
    parts = [str(part) for part in loc if part != "[key]"]
    key = ".".join(parts)
    place = next((lines[k] for k in _upwards(parts) if k in lines), None)
    where = f" (line {place})" if place else ""
    if detail["type"] == "extra_forbidden":
        section = _SECTIONS.get(parts[0], Grid) if len(parts) > 1 else Grid
        return f"unknown key {key}; known keys: {', '.join(section.model_fields)}{where}"
    if detail["type"] == "missing":
        return f"{key} is missing: {Grid.model_fields[key].description}"
    if detail["type"] == "string_pattern_mismatch":
        name = loc[-1] == "[key]"
        wanted = "letters, digits, - _ + ." if name else "key=value, such as federation.rounds=5"
        return f"{key} must be {wanted}, got {detail['input']!r}{where}"
    return f"{key}: {detail['msg'].lower()}, got {detail['input']!r}{where}"


def _upwards(parts: list[str]) -> list[str]:
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _listed(path: Path, found: list[str]) -> str:
    if len(found) == 1:
        return f"{path}: {found[0]}"
    return f"{path}: {len(found)} problems:\n" + "\n".join(f"  - {text}" for text in found)
