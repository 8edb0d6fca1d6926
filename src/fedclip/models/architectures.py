"""The OpenAI CLIP family: sizes of the published models, for random weights without a download."""

from __future__ import annotations

from transformers import CLIPConfig

# name -> vision (width, layers, heads, patch, image size), text (width, heads), projection.
# Source: table 20 of Radford et al. 2021 (arXiv 2103.00020) and the config.json of each model.
OPENAI_CLIP: dict[str, tuple[tuple[int, int, int, int, int], tuple[int, int], int]] = {
    "openai/clip-vit-base-patch32": ((768, 12, 12, 32, 224), (512, 8), 512),
    "openai/clip-vit-base-patch16": ((768, 12, 12, 16, 224), (512, 8), 512),
    "openai/clip-vit-large-patch14": ((1024, 24, 16, 14, 224), (768, 12), 768),
    "openai/clip-vit-large-patch14-336": ((1024, 24, 16, 14, 336), (768, 12), 768),
}


def openai_config(name: str) -> CLIPConfig:
    """Configuration of one published model; every text tower has 12 layers and 77 positions."""
    (width, layers, heads, patch, image_size), (text_width, text_heads), projection = OPENAI_CLIP[
        name
    ]
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": image_size,
        "projection_dim": projection,
    }
    text = {
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "num_hidden_layers": 12,
        "num_attention_heads": text_heads,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "projection_dim": projection,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)
