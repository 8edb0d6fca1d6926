"""What all sections of the configuration have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fedclip.layer_names import pattern_regex

Text = Annotated[str, Field(min_length=1)]
# A list in YAML is a tuple here, so that no two parts of a run can share one list and change it.
AsTuple = Field(strict=False)


def _pattern(text: str) -> str:
    pattern_regex(text)
    return text


Pattern = Annotated[Text, AfterValidator(_pattern)]
"""A pattern of layers: see `fedclip.layer_names`."""


class Section(BaseModel):
    """One mapping of the configuration: typed, closed to unknown keys, unchangeable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
