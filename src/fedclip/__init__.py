"""Federated LoRA fine-tuning of CLIP: sites exchange small adapters, never images.

The public surface loads lazily, so that `import fedclip` stays free of torch.
"""

from __future__ import annotations

import gc
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedclip.adapters.export import export
    from fedclip.adapters.inspect import info, load_run_model, predict
    from fedclip.adapters.merge import merge
    from fedclip.adapters.python import Run, evaluate, resume, run
    from fedclip.config import Config, load_config
    from fedclip.errors import UsageError
    from fedclip.federated.strategies import Strategy
    from fedclip.models.adapter_updates import open_adapter
    from fedclip.models.clip import CLIPLoRAWrapper, create_clip_model
    from fedclip.models.pretrained import base_folder
    from fedclip.reports.listener import Listener

__version__ = version("fedclip")

_HOMES = {
    "CLIPLoRAWrapper": "fedclip.models.clip",
    "Config": "fedclip.config",
    "Listener": "fedclip.reports.listener",
    "Run": "fedclip.adapters.python",
    "Strategy": "fedclip.federated.strategies",
    "UsageError": "fedclip.errors",
    "base_folder": "fedclip.models.pretrained",
    "create_clip_model": "fedclip.models.clip",
    "evaluate": "fedclip.adapters.python",
    "export": "fedclip.adapters.export",
    "info": "fedclip.adapters.inspect",
    "load_config": "fedclip.config",
    "load_run_model": "fedclip.adapters.inspect",
    "merge": "fedclip.adapters.merge",
    "open_adapter": "fedclip.models.adapter_updates",
    "predict": "fedclip.adapters.inspect",
    "resume": "fedclip.adapters.python",
    "run": "fedclip.adapters.python",
}

__all__ = [
    "CLIPLoRAWrapper",
    "Config",
    "Listener",
    "Run",
    "Strategy",
    "UsageError",
    "__version__",
    "base_folder",
    "create_clip_model",
    "evaluate",
    "export",
    "info",
    "load_config",
    "load_run_model",
    "merge",
    "open_adapter",
    "predict",
    "resume",
    "run",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedclip' has no attribute {name!r}")
    collecting = gc.isenabled()
    gc.disable()  # what an import makes stays: looking for garbage takes a tenth of its time
    try:
        return getattr(import_module(_HOMES[name]), name)
    finally:
        if collecting:
            gc.enable()
