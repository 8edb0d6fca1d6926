"""CLIP with a classifier and what is trained on it: the model that sites fine-tune together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from PIL import Image
from torch import nn
from transformers import CLIPModel

from fedclip.device import at_least_fp32
from fedclip.errors import UsageError
from fedclip.models import change_rank, summary
from fedclip.models.adapter_io import load_adapter, save_adapter
from fedclip.models.dropout import set_dropout_key
from fedclip.models.linear_head import head_parameters, new_classifier, warn_of_idle_text
from fedclip.models.lora_settings import LoraSettings
from fedclip.models.peft_lora import base_parameters, scaled_for_rank, tower_of
from fedclip.models.pretrained import Base, enable_checkpointing, load_base
from fedclip.models.protocols import Trainable
from fedclip.models.state import checked_state, write
from fedclip.models.tasks import ManyTasks
from fedclip.models.text_head import TextHead, checked_classes
from fedclip.models.trainable.lora import Lora
from fedclip.records import State


class CLIPLoRAWrapper(ManyTasks):
    """A CLIP whose trainable part is small, named, and easy to take out and put back."""

    def __init__(
        self,
        base: Base,
        *,
        kind: Trainable,
        head: str = "auto",
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.base_name = base.name
        self.num_classes = num_classes
        self.head: str | None = None
        self.classifier: nn.Linear | None = None
        self.kind = kind
        self.network: nn.Module = kind.attach(base.model, model_name=base.name, seed=seed)
        if gradient_checkpointing:
            enable_checkpointing(base.model)
        self.image_size = base.pixels.image_size
        self.preprocessing = base.pixels
        self.text_head = TextHead(base.tokens)
        self._tasks = {}
        self._asked_head = head
        self._seed = seed
        self._slot = "adapted"
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (base.pixels.mean, base.pixels.std))
        self._mean = nn.Buffer(mean, persistent=False)
        self._std = nn.Buffer(std, persistent=False)
        if class_names is not None:
            self.text_head.set_classes(checked_classes(class_names, num_classes), templates)
        elif templates is not None:
            self.text_head.use_templates(templates)
        self._settle_head()
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._mean.device

    @property
    def dtype(self) -> torch.dtype:
        """Format of the weights."""
        return self._mean.dtype

    @property
    def clip(self) -> CLIPModel:
        """The CLIP underneath, with the adapter's layers in place."""
        found = self.network
        return cast(CLIPModel, found.get_base_model() if isinstance(found, PeftModel) else found)

    @property
    def lora(self) -> LoraSettings | None:
        """Settings of the LoRA adapter; None where there is none."""
        return self.kind.settings if isinstance(self.kind, Lora) else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; empty when only their number is known."""
        return self.text_head.class_names

    @property
    def templates(self) -> tuple[str, ...]:
        """Prompt templates of the text classifier."""
        return self.text_head.templates

    def is_lora_enabled(self) -> bool:
        """Whether a LoRA adapter is trained, and neither a head alone nor the whole model."""
        return self.kind.has_factors

    def get_lora_info(self) -> dict[str, Any]:
        """Settings of the adapter, by layer where layers differ; counts concern LoRA alone."""
        return summary.lora_info(self)

    def get_model_summary(self) -> dict[str, Any]:
        """Parameters of base, LoRA and head, their total, and what is trained, also as a share."""
        return summary.summary(self)

    # --- the trainable tensors ---

    def trainable(self) -> dict[str, nn.Parameter]:
        """Live trainable tensors, sorted by the names of `get_parameters`."""
        return dict(self._trainable)

    def get_parameters(self) -> dict[str, torch.Tensor]:
        """Copy the trainable tensors, fp32 on the CPU, named as in `adapter_model.safetensors`."""
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True)
            for name, parameter in self.trainable().items()
        }

    def set_parameters(self, state: Mapping[str, Any]) -> None:
        """Put tensors (torch or numpy) in the place of the trainable ones.

        Names, shapes and finiteness are checked before anything is written, so a `UsageError`
        leaves the model as it was.
        """
        checked = checked_state(state, self._trainable, source="set_parameters: the state")
        with self.unmerged():
            write(self._trainable, checked)

    def set_rank(self, rank: int | Mapping[str, int]) -> None:
        """Give the adapter another rank, or some layers by pattern, as `{"vision_encoder": 4}`.

        The update and its scaling stay (lora_alpha follows): growing changes no output, shrinking
        keeps the nearest update of that rank. The trainable tensors are new ones, so make
        optimizers anew. Raises `UsageError` where nothing fits, and for a rank below 1.
        """
        kind = self._lora_kind("set_rank")
        with self.unmerged():
            kind.settings = change_rank.set_rank(self._peft, kind.settings, rank, seed=self._seed)
        self._settle_trainable()

    def adopt_ranks(self, config: Mapping[str, Any], state: State) -> None:
        """Take over ranks and scales of a PEFT configuration, and factors, as loading does."""
        kind = self._lora_kind("adopt_ranks")
        with self.unmerged():
            kind.settings = change_rank.adopt(self._peft, kind.settings, config, state)
        self._settle_trainable()

    def set_dropout_key(self, key: int | None) -> None:
        """Draw LoRA dropout from `key` until another is set; None draws from the global state."""
        set_dropout_key(self.network, key)

    def scaled_for_rank(self, rank: int) -> AbstractContextManager[None]:
        """Inside, updates are scaled as those of an adapter of that rank."""
        return scaled_for_rank(self.network, rank)

    # --- what it computes ---

    def to_pixels(self, images: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        """PIL images or arrays, resized and cropped as for training, uint8 `[n, 3, size, size]`."""
        return self.preprocessing.to_pixels(images)

    def set_classes(
        self, class_names: Sequence[str], templates: Sequence[str] | None = None
    ) -> None:
        """Name the classes: any that a text tower reads apart; a linear head keeps its number."""
        fixed = self.classifier.out_features if self.classifier is not None else None
        if fixed is not None and len(class_names) != fixed:
            raise UsageError(
                f"the linear classifier has {fixed} classes, got {len(class_names)} class names"
            )
        self.text_head.set_classes(class_names, templates)
        if self.head is None or (self.head == "linear" and self.classifier is None):
            self._settle_head()

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """L2-normalised image features `[batch, dim]`, fp32, of what `forward` takes."""
        return F.normalize(self.embed(pixels), dim=-1)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """L2-normalised features `[texts, dim]`, fp32, of plain texts; warns of one that is cut."""
        return self.text_head.encode(self.clip, texts)

    def text_features(self) -> torch.Tensor:
        """L2-normalised text features `[classes, dim]`, fp32; kept while the text tower holds."""
        trained = [p for name, p in self._trainable.items() if tower_of(name) == "text_encoder"]
        reuse = not torch.is_grad_enabled() and not self.training
        return self.text_head.features(self.clip, trained, slot=self._slot, reuse=reuse)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, classes]`, fp32.

        `pixels` is `[batch, 3, size, size]`: uint8 as from `to_pixels`, or floats that are
        already normalised.
        """
        if self.head is None:
            raise UsageError(
                "the model has no classifier: it knows neither class names nor a number of "
                "classes; call set_classes, or set model.num_classes"
            )
        if self.classifier is not None and self.head == "linear":
            features = self.embed(pixels)
            with self.full_precision():
                return self.classifier(features)
        images = self.encode_images(pixels)
        texts = self.text_features()
        with self.full_precision():
            return self.clip.logit_scale.exp() * images @ texts.T  # [batch, classes]

    @contextmanager
    def zero_shot(self) -> Iterator[CLIPLoRAWrapper]:
        """Inside, the model is the base model alone with its text classifier."""
        if not self.class_names:
            raise UsageError("zero-shot classification needs class names; call set_classes")
        base = self.kind.removed(self.network, self._base_parameters)
        head, self.head, self._slot = self.head, "text", "base"
        try:
            with self.unmerged(), base:
                yield self
        finally:
            self.head, self._slot = head, "adapted"

    def save_adapter(self, folder: str | PathLike[str]) -> None:
        """Write the trainable tensors as an adapter folder, whole or not at all.

        With LoRA it is one that PEFT reads.
        """
        save_adapter(self, Path(folder))

    def load_adapter(self, folder: str | PathLike[str]) -> None:
        """Read what `save_adapter` or PEFT wrote; a misfit raises and changes nothing.

        Base model and target layers must be the model's. An adapter whose ranks are its own (they
        differ by layer, exceed 64, or were changed by `set_rank`, stacking or merging) brings
        them along: the model then has the adapter's ranks and lora_alpha, as `get_lora_info`
        tells. Any other must have the rank and lora_alpha that the model was made with.
        """
        load_adapter(self, Path(folder))

    # --- inside ---

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Projected image embeddings `[batch, dim]`, fp32, not normalised."""
        pooled = self.clip.vision_model(pixel_values=self.normalised(pixels)).pooler_output
        return at_least_fp32(self.clip.visual_projection(pooled))

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the vision tower takes, of uint8 pixels; floats pass as they are."""
        return self.preprocessing.normalised(pixels.to(self.device), self._mean, self._std)

    @property
    def _peft(self) -> PeftModel:
        return cast(PeftModel, self.network)

    def _lora_kind(self, what: str) -> Lora:
        if not isinstance(self.kind, Lora):
            raise UsageError(
                f"{what}: this model trains {self.kind.title} ({self.kind.asked_by}), which has no "
                "rank; train a LoRA adapter"
            )
        return self.kind

    def _settle_head(self) -> None:
        """Choose the classifier by what is known, and with it what trains."""
        self.head = self._asked_head
        if self.head == "auto":
            known = "text" if self.class_names else "linear" if self.num_classes else None
            self.head = known
        count = self.num_classes or len(self.class_names)
        if self.head == "linear" and count:
            width = self.clip.visual_projection.out_features
            self.classifier = new_classifier(width, count, seed=self._seed).to(self.device)
            warn_of_idle_text(self.kind.parameters(self.network, idle_text=True))
        self._settle_trainable()

    def _settle_trainable(self) -> None:
        """Note which tensors train."""
        linear = self.head == "linear"
        body = self.kind.parameters(self.network, idle_text=linear)
        self._trainable = dict(sorted((body | head_parameters(self.classifier)).items()))

    def _base_parameters(self) -> State:
        return base_parameters(load_base(self.base_name, seed=self._seed).model)

    def full_precision(self) -> torch.autocast:
        """Inside, mixed precision is off."""
        return torch.autocast(self.device.type, enabled=False)
