"""Federated LoRA fine-tuning of CLIP: sites exchange small adapters, never images.

The public surface loads lazily, so that `import fedclip` stays free of torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedclip.experiment.run import Run, run
    from fedclip.models.clip import CLIPLoRAWrapper, create_clip_model
    from fedclip.models.pretrained import base_folder

__version__ = version("fedclip")

_HOMES = {
    "CLIPLoRAWrapper": "fedclip.models.clip",
    "Run": "fedclip.experiment.run",
    "base_folder": "fedclip.models.pretrained",
    "create_clip_model": "fedclip.models.clip",
    "run": "fedclip.experiment.run",
}

__all__ = ["CLIPLoRAWrapper", "Run", "__version__", "base_folder", "create_clip_model", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedclip' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
