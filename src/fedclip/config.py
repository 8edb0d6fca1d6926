"""The typed configuration tree: every key, its default, its range and what it means.

Reading files and overrides, and reporting every error at once, is `fedclip.config_io`'s work.
The descriptions below are the source of `docs/reference-configuration.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedclip.config_checks import cross_problems, lookup

DEFAULT_LEARNING_RATE = 1e-3

Module = Literal["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
Template = Annotated[str, Field(pattern=r"\{\}")]
Text = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
# A list in YAML is a tuple here, so that no two parts of a run can share one list and change it.
AsTuple = Field(strict=False)


class Section(BaseModel):
    """One mapping of the configuration: typed, closed to unknown keys, unchangeable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TargetModules(Section):
    """Which linear layers of each tower get an adapter; a tower that is not named gets none."""

    vision_encoder: Annotated[tuple[Module, ...], AsTuple] = Field(
        (), description="Layers of the vision tower."
    )
    text_encoder: Annotated[tuple[Module, ...], AsTuple] = Field(
        (), description="Layers of the text tower."
    )


class LoraConfig(Section):
    """The adapter that the sites train and exchange."""

    enabled: bool = Field(
        True, description="Train a LoRA adapter; `false` is full fine-tuning, the baseline."
    )
    r: int = Field(8, ge=1, le=64, description="Rank; 4 to 16 suits most tasks.")
    lora_alpha: float = Field(
        16.0,
        gt=0,
        description="Scale of the adapter's output (times `1/r`); 1 to 2 times `r` is usual.",
        json_schema_extra={"default": "2 * r"},
    )
    lora_dropout: float = Field(
        0.05, ge=0, le=0.3, description="Dropout before the adapter; 0.05 to 0.1 suits most tasks."
    )
    target_modules: TargetModules = Field(
        TargetModules(vision_encoder=("q_proj", "k_proj", "v_proj", "out_proj")),
        description="Layers that get an adapter, by tower.",
    )

    @model_validator(mode="before")
    @classmethod
    def _alpha_follows_rank(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("lora_alpha") is None:
            r = data.get("r", 8)
            return {**data, "lora_alpha": 2.0 * r if isinstance(r, int) and r > 0 else 16.0}
        return data

    @model_validator(mode="after")
    def _something_to_adapt(self) -> LoraConfig:
        modules = self.target_modules
        if self.enabled and not (modules.vision_encoder or modules.text_encoder):
            raise ValueError(
                "target_modules names no layer, so nothing would be trained; "
                "name some under vision_encoder or text_encoder, or set enabled: false"
            )
        return self


class ModelConfig(Section):
    """The pretrained CLIP, its classifier and its adapter."""

    type: Literal["clip"] = Field("clip", description="Kind of model.")
    model_name: Text = Field(
        "tiny",
        description="A hub id, a local folder in the hub's format, `tiny` (the embedded model), "
        "or `random:<hub id or folder>` (seeded random weights).",
    )
    head: Literal["auto", "text", "linear"] = Field(
        "auto",
        description="Classifier: `text` compares with the class names' text features, `linear` "
        "trains a layer; `auto` is `text` where class names are known.",
    )
    num_classes: int | None = Field(
        None, ge=1, description="Number of classes; `null` takes it from the data set."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    lora: LoraConfig = Field(LoraConfig(), description="The adapter.")


class ClientConfig(Section):
    """What one client does in one round."""

    local_epochs: int = Field(1, ge=1, description="Passes over a client's examples in a round.")
    learning_rate: float = Field(
        DEFAULT_LEARNING_RATE,
        gt=0,
        description="Local learning rate; the same quantity as `optimizer.learning_rate`.",
    )
    proximal_mu: float = Field(
        0.0, ge=0, description="Weight of FedProx's pull towards the round's global state."
    )


class OptimizerConfig(Section):
    """The optimizer inside a client; its state starts anew each round."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="Optimizer.")
    learning_rate: float = Field(
        DEFAULT_LEARNING_RATE,
        gt=0,
        description="Local learning rate; the same quantity as `client.learning_rate`.",
    )
    weight_decay: float = Field(0.01, ge=0, description="Decoupled for adamw, L2 for sgd.")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Gradients are clipped to this norm; `null` does not clip."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="How the learning rate falls over the rounds of the run."
    )


class PartitionConfig(Section):
    """How one data set is divided over clients."""

    name: Literal["auto", "iid", "dirichlet", "pathological", "shard", "natural", "size"] = Field(
        "auto",
        description="`auto` is `natural` (one client a site) where the data has sites, "
        "else `dirichlet`.",
    )
    alpha: float = Field(
        0.5, gt=0, description="Dirichlet concentration: the smaller, the more unlike the clients."
    )
    min_size: int = Field(2, ge=1, description="Fewest examples a client may get (dirichlet).")
    classes_per_client: int = Field(2, ge=1, description="Classes a client sees (pathological).")
    shards_per_client: int = Field(2, ge=1, description="Shards a client gets (shard).")
    size_skew: Literal["linear", "square", "exponential"] = Field(
        "linear", description="How sizes grow from client to client (size)."
    )


class DataConfig(Section):
    """The images, their classes and their division."""

    name: Literal["digits", "fashion_mnist", "icons", "imagefolder", "hub"] = Field(
        "digits", description="Data set."
    )
    path: Text | None = Field(
        None, description="The folder of `imagefolder`; the hub id or local path of `hub`."
    )
    layout: Literal["auto", "classes", "sites"] = Field(
        "auto", description="What the folder's first level means (imagefolder)."
    )
    class_names: Annotated[tuple[Text, ...], AsTuple] | None = Field(
        None, min_length=1, description="Class names; `null` takes the data set's own."
    )
    templates: Annotated[tuple[Template, ...], AsTuple] | None = Field(
        None,
        min_length=1,
        description="Prompts with `{}` for the class name; `null` takes the data set's own.",
    )
    batch_size: int = Field(32, ge=1, description="Examples in one forward pass.")
    accumulation_steps: int = Field(
        1, ge=1, description="Batches whose gradients make one optimizer step: memory is spared."
    )
    max_train_examples: int | None = Field(
        None, ge=1, description="Use at most this many training examples, over all clients."
    )
    validation_fraction: Fraction = Field(
        0.1, description="Share of a client's examples kept for tuning and choosing."
    )
    test_fraction: Fraction = Field(0.2, description="Share of a client's examples kept for tests.")
    on_bad_image: Literal["error", "skip"] = Field(
        "skip", description="What an unreadable image does; it is reported by path either way."
    )
    on_empty_site: Literal["error", "skip"] = Field(
        "error", description="What a site without images does."
    )
    memory_gb: float = Field(
        4.0, ge=0, description="Decoded images above this go to a memory-mapped cache on disk."
    )
    partition: PartitionConfig = Field(PartitionConfig(), description="Division over clients.")


class FederationConfig(Section):
    """Rounds, clients and how their updates are combined."""

    # These names, and the engines' below, are those of the registries; a test holds them together.
    # They stand here too so that `fedclip validate` knows them without loading torch.
    strategy: Literal["fedavg"] = Field(
        "fedavg", description="How updates become the next global state."
    )
    rounds: int = Field(10, ge=1, description="Rounds of the run.")
    num_clients: int = Field(
        10, ge=1, description="Clients; with natural sites, the sites say how many."
    )
    clients_per_round: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None = (
        Field(
            None,
            description="Clients drawn for a round: a number or a share; `null` takes all.",
            json_schema_extra={
                "expected": "a whole number >= 1 (clients), a share between 0 and 1, or null (all)"
            },
        )
    )


class EngineConfig(Section):
    """What carries a round out."""

    name: Literal["sequential"] = Field(
        "sequential", description="`sequential`: one client after another."
    )


class EvaluationConfig(Section):
    """When and on how much the global model is measured."""

    every: int = Field(1, ge=1, description="Evaluate every so many rounds, and after the last.")
    max_examples: int | None = Field(
        None, ge=1, description="Use at most this many examples of each set; `null` takes all."
    )
    keep_best: bool = Field(
        False, description="Also keep the best round by validation, in `adapter_best/`."
    )


class Config(Section):
    """A whole run."""

    seed: int = Field(0, ge=0, description="Seed from which every named draw follows.")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")] = Field(
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
    federation: FederationConfig = Field(FederationConfig(), description="Federation.")
    engine: EngineConfig = Field(EngineConfig(), description="Engine.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="Evaluation.")

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

    @model_validator(mode="after")
    def _parts_agree(self) -> Config:
        problems = cross_problems(self.model_dump())
        if problems:
            raise ValueError("; ".join(problem.text for problem in problems))
        return self


def _given(section: Any) -> Any:
    if isinstance(section, Section):
        return section.model_dump(exclude_unset=True)
    return dict(section) if isinstance(section, Mapping) else section
