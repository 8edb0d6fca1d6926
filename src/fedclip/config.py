"""The typed configuration tree: every key, its default, its range and what it means.

The sections `model` and `data` have files of their own. Reading files and overrides, and reporting
every error at once, is `fedclip.config_io`'s work. The descriptions are the source of
`docs/reference-configuration.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from fedclip.config_checks import cross_problems, lookup
from fedclip.config_data import DataConfig, PartitionConfig
from fedclip.config_deploy import DeployConfig
from fedclip.config_model import LoraConfig, ModelConfig, TargetModules
from fedclip.config_ranks import (
    CLIENT_MEMORY,
    CLIENT_RANKS,
    ClientMemory,
    ClientRanks,
    DynamicRankConfig,
)
from fedclip.config_section import AsTuple, Pattern, Section
from fedclip.config_tasks import SharingConfig, TaskConfig, TaskName, laid_over

__all__ = [
    "ClientConfig",
    "Config",
    "DataConfig",
    "DeployConfig",
    "DynamicRankConfig",
    "EngineConfig",
    "EvaluationConfig",
    "FederationConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PartitionConfig",
    "ServerOptimizerConfig",
    "SharingConfig",
    "TargetModules",
    "TaskConfig",
]

DEFAULT_LEARNING_RATE = 1e-3


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
    rate_pattern: dict[Pattern, Annotated[float, Field(ge=0)]] = Field(
        {},
        description="Factors on the learning rate, by patterns of layers or of tensors (`lora_A`, "
        "`lora_B`, `head`); the first that fits counts.",
    )


StrategyName = Literal[
    "fedavg",
    "fedit",
    "ffa",
    "rolora",
    "fedsa",
    "flora",
    "flexlora",
    "hetlora",
    "fedex",
    "fedsvd",
    "lora_fair",
    "fed_sb",
    "qfedavg",
    "local",
    "centralised",
]


class ServerOptimizerConfig(Section):
    """The server's step along what the strategy proposes (Reddi et al. 2021, arXiv:2003.00295)."""

    name: Literal["none", "avgm", "adam", "yogi", "adagrad"] = Field(
        "none", description="`none` takes what the strategy proposes; else FedAvgM, FedAdam, ..."
    )
    learning_rate: float = Field(
        0.01, gt=0, description="The server's rate; FedAvgM wants about 1, the others far less."
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Momentum (not adagrad).")
    beta2: float = Field(0.99, ge=0, lt=1, description="Memory of squares (adam, yogi).")
    tau: float = Field(1e-3, gt=0, description="Added to the root of the squares.")


class FederationConfig(Section):
    """Rounds, clients and how their updates are combined."""

    # These names, and the engines' below, are those of the registries; a test holds them together.
    # They stand here too so that `fedclip validate` knows them without loading torch.
    strategy: StrategyName | Annotated[str, Field(pattern=r".+\.py:\w+$")] = Field(
        "fedavg",
        description="How updates become the next global state; see the page on strategies. "
        "`path/to/file.py:Name` is a class of your own.",
        json_schema_extra={
            "expected": f"one of {', '.join(get_args(StrategyName))}, or path/to/file.py:Name"
        },
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
    client_ranks: ClientRanks = CLIENT_RANKS
    client_memory_mb: ClientMemory = CLIENT_MEMORY
    dynamic_ranks: DynamicRankConfig = Field(
        DynamicRankConfig(), description="Ranks that change during the run."
    )

    sharing: SharingConfig = Field(SharingConfig(), description="Who trains together.")
    server_optimizer: ServerOptimizerConfig = Field(
        ServerOptimizerConfig(), description="The server's optimizer."
    )
    scaffold: bool = Field(
        False, description="Control variates against client drift (SCAFFOLD); for plain SGD."
    )
    ditto_mu: float | None = Field(
        None,
        gt=0,
        description="Also train a personal model for each client, pulled to the shared one with "
        "this weight (Ditto); `null` trains none.",
    )
    q: float = Field(1.0, ge=0, description="How much more a client of high loss weighs (qfedavg).")
    ridge: float = Field(
        0.01, ge=0, description="Weight that keeps LoRA-FAIR's correction small (lora_fair)."
    )
    average_owners: bool = Field(
        False, description="Average a row over the clients that hold it (hetlora, flexlora)."
    )
    order_rows: bool = Field(
        True, description="Turn the mean so that lower ranks get what matters most (hetlora)."
    )


class EngineConfig(Section):
    """What carries a round out."""

    name: Literal["batched", "sequential"] = Field(
        "batched",
        description=(
            "`batched`: many clients in one pass over the shared weights; `sequential`: one after "
            "another, the readable reference (full fine-tuning, DoRA and captions always take it)."
        ),
    )
    group_size: int | None = Field(
        None, ge=1, description="Clients in one pass (batched); `null`: as many as memory allows."
    )
    memory_gb: float | None = Field(
        None,
        gt=0,
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
    compile: bool = Field(
        False,
        description="Compile the encoder layers (batched): a minute or so once, then faster steps "
        "where it pays; see the page on speed.",
    )


class EvaluationConfig(Section):
    """When and on how much the global model is measured."""

    every: int = Field(1, ge=1, description="Evaluate every so many rounds, and after the last.")
    max_examples: int | None = Field(
        None, ge=1, description="Use at most this many examples of each set; `null` takes all."
    )
    other_data: Annotated[tuple[Literal["digits", "fashion_mnist", "icons"], ...], AsTuple] = Field(
        (),
        description="After the run, also measure on these data sets, which were not trained: what "
        "was forgotten.",
    )
    keep_best: bool = Field(
        False, description="Also keep the best round by validation, in `adapter_best/`."
    )


class Config(Section):
    """A whole run."""

    seed: int = Field(0, ge=0, description="Seed from which every named draw follows.")
    task: Literal["classification", "contrastive"] = Field(
        "classification",
        description="What is learned: images to classes, or image-caption pairs "
        "(see the page on captions).",
    )
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
    tasks: dict[TaskName, TaskConfig] = Field(
        {},
        description="Several tasks in one federation, by name, instead of the one of `data`.",
    )
    federation: FederationConfig = Field(FederationConfig(), description="Federation.")
    engine: EngineConfig = Field(EngineConfig(), description="Engine.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="Evaluation.")
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
    def _parts_agree(self) -> Config:
        problems = cross_problems(self.model_dump())
        if problems:
            raise ValueError("; ".join(problem.text for problem in problems))
        return self


def _given(section: Any) -> Any:
    if isinstance(section, Section):
        return section.model_dump(exclude_unset=True)
    return dict(section) if isinstance(section, Mapping) else section
