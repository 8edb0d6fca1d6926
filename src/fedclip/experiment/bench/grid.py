"""The grid file: which arms are compared, on which configuration, seeds and hyperparameters."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from fedclip.config.section import AsTuple, Section, Seed, Text
from fedclip.config.strict_yaml import read_yaml
from fedclip.errors import UsageError

Override = Annotated[Text, Field(pattern=r"^[^=\s]+=")]
Overrides = Annotated[tuple[Override, ...], AsTuple]
Seeds = Annotated[tuple[Seed, ...], AsTuple]
# It becomes part of a folder's name.
ArmName = Annotated[str, Field(max_length=100, pattern=r"^\w[\w.+-]*$")]
Key = Annotated[str, Field(max_length=200, pattern=r"^[a-z_]+(\.[\w-]+)+$")]
Whole = Annotated[int, Field(ge=0, le=1_000_000_000)]
Number = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Knobs = dict[
    Key, Annotated[tuple[Whole | Number, ...], AsTuple, Field(min_length=1, max_length=50)]
]
Factors = dict[Key, Annotated[tuple[bool | int | float | Text, ...], AsTuple, Field(min_length=1)]]


class Tuning(Section):
    """How hyperparameters are chosen: by validation loss, on seeds that nothing else uses."""

    seeds: Seeds = Field(
        (100, 101), min_length=2, description="Seeds of the tuning runs; none of `seeds`."
    )
    overrides: Overrides = Field((), description="What makes a tuning run shorter.")
    budget: int = Field(8, ge=2, le=50, description="Values tried of every knob of every arm.")


class Arm(Section):
    """What is compared: one way to run the configuration."""

    overrides: Overrides = Field((), description="What differs from the other arms.")
    tune: Knobs = Field({}, description="Knobs of its own, or other values of the common ones.")


class Full(Section):
    """What `--full` changes."""

    seeds: Seeds | None = Field(None, min_length=1, description="Seeds in the place of `seeds`.")
    overrides: Overrides = Field((), description="Laid over `overrides`.")


class Grid(Section):
    """A whole comparison."""

    config: Text = Field(description="Configuration of all runs; beside the grid file.")
    overrides: Overrides = Field((), description="What all arms change of it.")
    seeds: Seeds = Field((0, 1, 2), min_length=1, description="Every arm runs each of them.")
    test_seed: Seed = Field(0, description="Seed of the test set, which all seeds share.")
    tune: Knobs = Field(
        {}, description="Hyperparameters to tune, with first values; one value is taken as it is."
    )
    tuning: Tuning = Field(Tuning(), description="How they are tuned.")
    arms: dict[ArmName, Arm] = Field(min_length=1, description="Arms by name.")
    over: Factors = Field({}, description="Keys with values: every arm at every combination.")
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
        """`name:` with nothing behind it is the unchanged configuration."""
        return {k: v or {} for k, v in value.items()} if isinstance(value, dict) else value

    def combinations(self) -> dict[str, tuple[str, ...]]:
        """Overrides of each combination of the factors `over`, by the end of its arms' names."""
        found: dict[str, tuple[str, ...]] = {}
        for values in product(*self.over.values()):
            pairs = list(zip(self.over, values, strict=True))
            words = [f"{key.rpartition('.')[2]}-{_shown(value)}" for key, value in pairs]
            overrides = tuple(f"{key}={_shown(value)}" for key, value in pairs)
            found["".join(f".{word}" for word in words)] = overrides
        return found

    def knobs(self, arm: Arm) -> dict[str, tuple[float, ...]]:
        """The values that an arm tunes, ascending: the common knobs, then the arm's."""
        return {
            key: tuple(sorted(set(values))) for key, values in {**self.tune, **arm.tune}.items()
        }


_SECTIONS: dict[str, type[Section]] = {"tuning": Tuning, "full": Full, "arms": Arm}
_GONE = {
    "rates": "tune: {client.learning_rate: [...]}",
    "tuning.rates": "tune: {client.learning_rate: [...]}",
    "tuning.seed": "tuning.seeds, a list of at least two",
}


def load_grid(path: Path) -> Grid:
    """Read a grid file; a UsageError lists everything that is wrong with it."""
    values, lines = read_yaml(path)
    try:
        grid = Grid.model_validate(values)
    except ValidationError as error:
        found = [_sentence(detail["loc"], detail, lines) for detail in error.errors()]
        raise UsageError(_listed(path, list(dict.fromkeys(found)))) from None
    found = _problems(grid)
    if found:
        raise UsageError(_listed(path, found))
    return grid


def _problems(grid: Grid) -> list[str]:
    """What single keys do not show."""
    known = ", ".join(grid.arms)
    unknown = [name for name in grid.reference if name not in grid.arms]
    found = [f"reference: no arm {name!r}; arms: {known}" for name in unknown]
    both = {*grid.seeds, *(grid.full.seeds or ())} & {*grid.tuning.seeds}
    if both:
        found.append(
            f"tuning.seeds: {min(both)} is one of the seeds that are compared; choose another, so "
            "that nothing is chosen on what it is judged by"
        )
    if len(set(grid.tuning.seeds)) < 2:
        found.append("tuning.seeds: name two different seeds at least")
    for name, arm in grid.arms.items():
        for key, values in grid.knobs(arm).items():
            where = f"arms.{name}.tune.{key}" if key in arm.tune else f"tune.{key}"
            if len(values) > grid.tuning.budget:
                found.append(
                    f"{where}: {len(values)} values are more than tuning.budget, "
                    f"{grid.tuning.budget}; raise that, or leave values out"
                )
            if any(line.startswith(f"{key}=") for line in arm.overrides):
                found.append(f"arms.{name}.overrides: {key} is tuned; name it in one place")
    return found + _doubled(grid)


def _doubled(grid: Grid) -> list[str]:
    """Factors of one value only, or whose combinations have one name."""
    count = 1
    for values in grid.over.values():
        count *= len(values)
    if len(grid.combinations()) < count:
        return ["over: two combinations would have one name; leave out what stands twice"]
    if count * len(grid.arms) > 10_000:
        return [f"over: {count} combinations of {len(grid.arms)} arms are too many"]
    return []


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _sentence(loc: tuple[int | str, ...], detail: Any, lines: dict[str, int]) -> str:
    # pydantic marks a bad key of a mapping by a last part "[key]", and a union's member by a type.
    parts = [str(part) for part in loc if part != "[key]"]
    key = ".".join(parts)
    place = next((lines[k] for k in _upwards(parts) if k in lines), None)
    where = f" (line {place})" if place else ""
    if detail["type"] == "extra_forbidden":
        gone = _GONE.get(key) or (_GONE.get(parts[-1]) if parts[0] == "arms" else None)
        if gone:
            return f"{key} is {gone} now{where}"
        section = _SECTIONS.get(parts[0], Grid) if len(parts) > 1 else Grid
        return f"unknown key {key}; known keys: {', '.join(section.model_fields)}{where}"
    if detail["type"] == "missing":
        return f"{key} is missing: {Grid.model_fields[key].description}"
    if detail["type"] == "string_pattern_mismatch":
        name = loc[-1] == "[key]" and parts[0] == "arms" and len(parts) == 2
        if loc[-1] == "[key]" and not name:
            return f"{key} must be a key of the configuration, such as client.learning_rate{where}"
        wanted = "letters, digits, - _ + ." if name else "key=value, such as federation.rounds=5"
        return f"{key} must be {wanted}, got {detail['input']!r}{where}"
    return f"{key}: {detail['msg'].lower()}, got {detail['input']!r}{where}"


def _upwards(parts: list[str]) -> list[str]:
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _listed(path: Path, found: list[str]) -> str:
    if len(found) == 1:
        return f"{path}: {found[0]}"
    return f"{path}: {len(found)} problems:\n" + "\n".join(f"  - {text}" for text in found)
