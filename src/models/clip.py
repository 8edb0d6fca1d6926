"""The guide's import path: `from models.clip import create_clip_model`."""

from fedclip.models.clip import CLIPLoRAWrapper, create_clip_model

__all__ = ["CLIPLoRAWrapper", "create_clip_model"]
