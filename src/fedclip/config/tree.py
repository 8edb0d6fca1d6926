"""The typed configuration tree: the sections together, and what they take from each other.

Reading files and overrides, and reporting every error at once, is `fedclip.config.loading`'s work.
The descriptions are the source of `docs/reference-configuration.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from fedclip.config.attack import AttackConfig
from fedclip.config.checks import cross_problems
from fedclip.config.data import DataConfig, TaskConfig, TaskName, laid_over
from fedclip.config.deploy import DeployConfig
from fedclip.config.federation import FederationConfig
from fedclip.config.model import ModelConfig
from fedclip.config.privacy import PrivacyConfig
from fedclip.config.robust import RobustConfig
from fedclip.config.section import SINGLE_KEYS, AsTuple, Named, Section, Seed, each_once, lookup
from fedclip.config.secure import SecureConfig
from fedclip.config.training import (
    DEFAULT_LEARNING_RATE,
    ClientConfig,
    EngineConfig,
    EvaluationConfig,
    OptimizerConfig,
)


class Config(Section):
    """A whole run."""

    seed: Seed = Field(0, description="Seed from which every named draw follows.")
    task: Literal["classification", "contrastive"] = Field(
        "classification",
        description="What is learned: images to classes, or image-caption pairs "
        "(see the page on captions).",
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?|mps)$")] = Field(
        "auto",
        description="`auto` takes the first accelerator there is.",
        json_schema_extra={"expected": "auto, cpu, cuda, cuda:<number> or mps"},
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Arithmetic of forward and backward passes; adapters stay in fp32."
    )
    model: ModelConfig = Field(ModelConfig(), description="Model.")
    client: ClientConfig = Field(ClientConfig(), description="Local training.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="Local optimizer.")
    data: DataConfig = Field(DataConfig(), description="Data.")
    tasks: dict[TaskName, TaskConfig] = Field(
        {},
        description="Several tasks in one federation, by name, instead of the one of `data`.",
    )
    federation: FederationConfig = Field(FederationConfig(), description="Federation.")
    robust: RobustConfig = Field(RobustConfig(), description="Clients whom one does not trust.")
    attack: AttackConfig = Field(AttackConfig(), description="Hostile clients of a simulation.")
    secure: SecureConfig = Field(SecureConfig(), description="Secure aggregation.")
    engine: EngineConfig = Field(EngineConfig(), description="Engine.")
    privacy: PrivacyConfig = Field(PrivacyConfig(), description="Differential privacy.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="Evaluation.")
    tracking: Annotated[
        tuple[Annotated[str, AfterValidator(Named("trackers"))], ...],
        AsTuple,
        AfterValidator(each_once),
    ] = Field(
        (),
        description="Where the figures of each round go beside the run folder (see the page on "
        "trackers); may differ when a run is resumed.",
    )
    deploy: DeployConfig = Field(DeployConfig(), description="Several machines.")

    @model_validator(mode="before")
    @classmethod
    def _one_learning_rate(cls, data: Any) -> Any:
        """Let each of the two keys of the one local learning rate speak for the other."""
        if not isinstance(data, Mapping):
            return data
        sections = {key: _given(data.get(key, {})) for key in ("client", "optimizer")}
        rates = [lookup(sections, f"{key}.learning_rate") for key in sections]
        # A value that is no rate is reported under its own key only.
        usable = [rate for rate in rates if isinstance(rate, int | float) and 0 < rate < math.inf]
        rate = usable[0] if usable else DEFAULT_LEARNING_RATE
        for section in sections.values():
            if isinstance(section, dict) and section.get("learning_rate") is None:
                section["learning_rate"] = rate
        return {**data, **sections}

    @model_validator(mode="before")
    @classmethod
    def _tasks_take_after_data(cls, data: Any) -> Any:
        """Let every task have what `data` says, but for what it says itself."""
        if not isinstance(data, Mapping) or not isinstance(data.get("tasks"), Mapping):
            return data
        common = _given(data.get("data", {}))
        if not isinstance(common, Mapping):
            return data
        tasks = {name: laid_over(common, _given(own)) for name, own in data["tasks"].items()}
        return {**data, "tasks": tasks}

    @model_validator(mode="after")
    def _parts_agree(self, info: ValidationInfo) -> Config:
        problems = [] if info.context == SINGLE_KEYS else cross_problems(self)
        if problems:
            raise ValueError("; ".join(problem.text for problem in problems))
        return self


def _given(section: Any) -> Any:
    if isinstance(section, Section):
        return section.model_dump(exclude_unset=True)
    return dict(section) if isinstance(section, Mapping) else section
