"""The `model` section: the pretrained CLIP, its classifier and its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedclip.config.section import MAX_PATTERNS, AsTuple, Pattern, Section, Text, Times

VisionModule = Literal["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "visual_projection"]
TextModule = Literal["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "text_projection"]
MAX_RANK = 64

Trained = Literal["lora", "head", "full"]
"""What is trained beside a head: a LoRA adapter, nothing, or all weights."""

Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Alpha = Annotated[float, Field(ge=1e-6, le=1_000_000)]
Dropout = Annotated[float, Field(ge=0, le=0.3)]


class TargetModules(Section):
    """Which linear layers of each tower get an adapter; a tower that is not named gets none."""

    vision_encoder: Annotated[tuple[VisionModule, ...], AsTuple] = Field(
        (), description="Layers of the vision tower."
    )
    text_encoder: Annotated[tuple[TextModule, ...], AsTuple] = Field(
        (), description="Layers of the text tower."
    )


class LoraConfig(Section):
    """The adapter that the sites train and exchange."""

    enabled: bool = Field(
        True, description="Train a LoRA adapter; `false` is full fine-tuning, the baseline."
    )
    r: int = Field(8, ge=1, le=MAX_RANK, description="Rank; 4 to 16 suits most tasks.")
    lora_alpha: Alpha = Field(
        16.0,
        description="Scale of the adapter's output (times `1/r`); 1 to 2 times `r` is usual.",
        json_schema_extra={"default": "2 * r"},
    )
    lora_dropout: float = Field(
        0.05, ge=0, le=0.3, description="Dropout before the adapter; 0.05 to 0.1 suits most tasks."
    )
    target_modules: TargetModules = Field(
        TargetModules(vision_encoder=("q_proj", "k_proj", "v_proj", "out_proj")),
        description="Layers that get an adapter, by tower; `{}` with `model.head: linear` trains "
        "the head alone (a linear probe).",
    )
    last_layers: Times | None = Field(
        None,
        description="Adapt only the last so many encoder layers of a tower; `null` adapts all. "
        "What the layers below produce never changes, and is computed once.",
    )

    exclude_modules: Annotated[tuple[Pattern, ...], AsTuple] = Field(
        (), description="Patterns of layers that get no adapter after all."
    )
    rank_pattern: dict[Pattern, Rank] = Field(
        {},
        max_length=MAX_PATTERNS,
        description="Ranks of the layers that a pattern fits, instead of `r`.",
    )
    alpha_pattern: dict[Pattern, Alpha] = Field(
        {},
        max_length=MAX_PATTERNS,
        description="The same for `lora_alpha`; where `rank_pattern` alone fits, it follows the "
        "rank so that the scaling stays.",
    )
    dropout_pattern: dict[Pattern, Dropout] = Field(
        {}, max_length=MAX_PATTERNS, description="The same for `lora_dropout`."
    )
    use_rslora: bool = Field(
        False, description="Scale by `lora_alpha / sqrt(r)` (rsLoRA), not `lora_alpha / r`."
    )
    use_dora: bool = Field(
        False,
        description="Train the length of each output's weights as well (DoRA); takes the "
        "sequential engine.",
    )

    @model_validator(mode="before")
    @classmethod
    def _alpha_follows_rank(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("lora_alpha") is None:
            r = data.get("r", 8)
            return {
                **data,
                "lora_alpha": 2.0 * r if isinstance(r, int) and 0 < r <= MAX_RANK else 16.0,
            }
        return data


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
    num_classes: Times | None = Field(
        None, description="Number of classes; `null` takes it from the data set."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    lora: LoraConfig = Field(LoraConfig(), description="The adapter.")

    @property
    def trains(self) -> Trained:
        """What is trained beside a head."""
        if not self.lora.enabled:
            return "full"
        targets = self.lora.target_modules
        return "lora" if targets.vision_encoder or targets.text_encoder else "head"

    @property
    def no_lora(self) -> str | None:
        """Why there is no LoRA adapter; None where there is one."""
        return {
            "full": "model.lora.enabled is false",
            "head": "model.lora.target_modules names no layer",
        }.get(self.trains)

    @model_validator(mode="after")
    def _something_to_train(self) -> ModelConfig:
        if self.trains == "head" and self.head != "linear":
            raise ValueError(
                "lora.target_modules names no layer, so nothing would be trained; name some under "
                "vision_encoder or text_encoder, set head: linear to train a linear head alone (a "
                "linear probe), or lora.enabled: false to train all weights"
            )
        return self
