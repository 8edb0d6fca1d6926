"""Both towers as ONNX graphs, for runtimes without torch."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fedclip.device import at_least_fp32
from fedclip.errors import FedclipError, UsageError, install
from fedclip.models.export.transformers_folder import (
    CLASSES,
    PROCESSORS,
    check_processors,
    save_processors,
    write_classes,
)
from fedclip.models.whole_folder import write_folder
from fedclip.models.wrapper import CLIPLoRAWrapper

IMAGE = "image_encoder.onnx"
TEXT = "text_encoder.onnx"
_OPSET = 17
_TOLERANCE = 1e-4  # of an embedding of length one, far above rounding


class ImageEncoder(nn.Module):
    """Normalised pixels `[batch, 3, size, size]` to embeddings of length one `[batch, dim]`.

    With a trained head its logits `[batch, classes]` come second.
    """

    def __init__(self, model: CLIPLoRAWrapper) -> None:
        super().__init__()
        self.clip = model.clip
        self.head = model.classifier if model.head == "linear" else None

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What `CLIPLoRAWrapper.encode_images` gives, and the head's logits."""
        pooled = self.clip.vision_model(pixel_values=pixel_values).pooler_output
        embedded = at_least_fp32(self.clip.visual_projection(pooled))
        own = () if self.head is None else (self.head(embedded),)
        return (F.normalize(embedded, dim=-1), *own)

    @property
    def outputs(self) -> list[str]:
        """Names of what comes out."""
        return ["image_embeds"] if self.head is None else ["image_embeds", "logits"]


class TextEncoder(nn.Module):
    """Token ids `[batch, tokens]` to embeddings of length one `[batch, dim]`.

    Attention is causal and the end token is pooled, so padding after it needs no mask.
    """

    def __init__(self, model: CLIPLoRAWrapper) -> None:
        super().__init__()
        self.clip = model.clip

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One embedding for each text."""
        pooled = self.clip.text_model(input_ids=input_ids).pooler_output
        return (F.normalize(at_least_fp32(self.clip.text_projection(pooled)), dim=-1),)


def save_onnx(model: CLIPLoRAWrapper, folder: Path) -> None:
    """Write a model without adapter as two graphs, its classes, tokenizer and image processor.

    The graphs take any batch, the text one any number of tokens. They are run with onnxruntime
    and compared with torch before the folder appears. Raises `UsageError` where `onnx` or
    `onnxruntime` is not installed.
    """
    assert not model.is_lora_enabled()
    check_processors(model.base_name)
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"exporting to ONNX needs {' and '.join(missing)}; {install('onnx')}")
    ids = _prompt_ids(model)
    size = model.image_size
    noise = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    images, texts = ImageEncoder(model).eval(), TextEncoder(model).eval()

    def write(fresh: Path) -> None:
        _write_graph(images, noise[:2], fresh / IMAGE, "pixel_values", images.outputs, ["batch"])
        axes = ["batch", "tokens"]
        _write_graph(texts, ids, fresh / TEXT, "input_ids", ["text_embeds"], axes)
        _check(images, noise, fresh / IMAGE)
        # Another number of texts and of tokens than the graph was made with.
        _check(texts, torch.cat([ids, ids[:, -1:]], dim=1)[:1], fresh / TEXT)
        save_processors(model.base_name, fresh)
        known = {"input_ids": ids.tolist()} if model.class_names else {}
        write_classes(model, fresh, **known)

    write_folder(folder, (IMAGE, TEXT, CLASSES, *PROCESSORS), write)


def _prompt_ids(model: CLIPLoRAWrapper) -> torch.Tensor:
    """Ids of the classes' prompts, or where there are none, any two texts."""
    if model.class_names:
        return model.text_head.prompt_ids()[0]
    config: Any = model.clip.config.text_config
    return torch.tensor([[0, 1, config.vocab_size - 1]] * 2)


def _write_graph(
    encoder: nn.Module,
    example: torch.Tensor,
    path: Path,
    name: str,
    outputs: list[str],
    axes: list[str],
) -> None:
    named = dict(enumerate(axes))
    # The exporter that is made of tracing: the other one takes 20 times as long, and one package
    # more. It warns of being the older one, and of checks that it takes for constant.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            encoder,
            (example,),
            path,
            dynamo=False,
            opset_version=_OPSET,
            input_names=[name],
            output_names=outputs,
            dynamic_axes={name: named, **{output: {0: axes[0]} for output in outputs}},
        )


def _check(encoder: nn.Module, inputs: torch.Tensor, path: Path) -> None:
    """Raise unless onnxruntime computes what torch computes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (one.name for one in session.get_inputs())
    found = session.run(None, {name: inputs.numpy()})[0]
    with torch.no_grad():
        expected = encoder(inputs)[0]
    difference = float((torch.from_numpy(found) - expected).abs().max())
    if not difference <= _TOLERANCE:
        raise FedclipError(
            f"{path.name}: onnxruntime and torch differ by {difference:.1g}; nothing was written"
        )
