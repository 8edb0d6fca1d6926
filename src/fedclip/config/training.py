"""The sections `client`, `optimizer`, `engine` and `evaluation`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from fedclip.config.section import (
    MAX_PATTERNS,
    AsTuple,
    Count,
    Gigabytes,
    Named,
    Pattern,
    Rate,
    Removed,
    Section,
    Times,
    Weight,
)

DEFAULT_LEARNING_RATE = 1e-3


class ClientConfig(Section):
    """What one client does in one round."""

    local_epochs: Times = Field(1, description="Passes over a client's examples in a round.")
    learning_rate: Rate = Field(
        DEFAULT_LEARNING_RATE,
        description="Local learning rate; the same quantity as `optimizer.learning_rate`.",
    )
    proximal_mu: Weight = Field(
        0.0, description="Weight of FedProx's pull towards the round's global state."
    )


class OptimizerConfig(Section):
    """The optimizer inside a client; its state starts anew each round."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="Optimizer.")
    learning_rate: Rate = Field(
        DEFAULT_LEARNING_RATE,
        description="Local learning rate; the same quantity as `client.learning_rate`.",
    )
    weight_decay: Weight = Field(
        0.01, description="Decoupled for adamw, L2 for sgd; of matrices only."
    )
    max_grad_norm: Annotated[float, Field(ge=1e-9, le=1e9)] | None = Field(
        1.0, description="Gradients are clipped to this norm; `null` does not clip."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="How the learning rate falls over the rounds of the run."
    )
    rate_pattern: dict[Pattern, Weight] = Field(
        {},
        max_length=MAX_PATTERNS,
        description="Factors on the learning rate, by patterns of layers or of tensors (`lora_A`, "
        "`lora_B`, `head`); the first that fits counts.",
    )


class EngineConfig(Section):
    """What carries a round out."""

    removed_keys: ClassVar = {
        "compile": Removed(False, "the eager engine is as fast; leave the key out")
    }

    name: Annotated[str, AfterValidator(Named("engines"))] = Field(
        "batched",
        description=(
            "`batched`: many clients in one pass over the shared weights; `sequential`: one after "
            "another, the readable reference (full fine-tuning, DoRA and captions always take it)."
        ),
    )
    group_size: Times | None = Field(
        None, description="Clients in one pass (batched); `null`: as many as memory allows."
    )
    memory_gb: Gigabytes | None = Field(
        None,
        description="Memory for a group of clients, and as much for the prefix cache (batched); "
        "`null`: a quarter of all there is, for each.",
    )
    prefix_cache: Literal["auto", "off", "memory", "disk"] = Field(
        "auto",
        description="Keep what the layers below the first adapted one make of each image "
        "(batched): in memory, or in a memory-mapped file; `auto`: in memory where it fits.",
    )
    prefix_dtype: Literal["fp32", "fp16"] = Field(
        "fp32", description="Format of the prefix cache; `fp16` takes half the space."
    )
    graphs: Literal["auto", "off"] = Field(
        "auto",
        description="Training steps as CUDA graphs (batched): `auto`: on CUDA; `off`: one kernel "
        "after another.",
    )


class EvaluationConfig(Section):
    """When and on how much the global model is measured."""

    every: Times = Field(1, description="Evaluate every so many rounds, and after the last.")
    max_examples: Count | None = Field(
        None, description="Use at most this many examples of each set; `null` takes all."
    )
    other_data: Annotated[
        tuple[Annotated[str, AfterValidator(Named("data_sets", without="path"))], ...], AsTuple
    ] = Field(
        (),
        description="After the run, also measure on these data sets, which were not trained: what "
        "was forgotten.",
    )
    metrics: Annotated[tuple[Annotated[str, AfterValidator(Named("metrics"))], ...], AsTuple] = (
        Field(
            (),
            description="Further metrics beside accuracy and loss, for every evaluated set.",
        )
    )
    keep_hits: bool = Field(
        False,
        description="Also record which test images are classified correctly, for statistics over "
        "images; of one task with a shared model.",
    )
    keep_best: bool = Field(
        False, description="Also keep the best round by validation, in `adapter_best/`."
    )
    patience: Times | None = Field(
        None,
        description="End the run when validation accuracy has not improved for so many "
        "evaluations; `null` never does.",
    )
