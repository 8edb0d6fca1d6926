"""CLIP, its LoRA adapters and its heads."""
