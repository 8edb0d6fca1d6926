"""Reproduce the zero-shot figures of the embedded model's card.

Each data set's classes are named in a few prompts, whose embeddings are averaged; every picture
goes to the nearest. Digits: all 1,797 of scikit-learn's. Icons: the test split of the held-out
families. Fashion-MNIST: the 10,000 test images of Debian's `dataset-fashion-mnist`, where present.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from tiny import evaluate, model
from transformers import CLIPModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[1]


def main(
    folder: Annotated[
        Path, typer.Option("--model", help="A model folder in the hub's format.")
    ] = ROOT / "src/fedclip/models/tiny",
    icons: Annotated[Path, typer.Option(help="Where icons.npz lies.")] = ROOT
    / "src/fedclip/data/icons",
    fashion: Annotated[
        Path, typer.Option(help="Where Fashion-MNIST's files lie.")
    ] = evaluate.FASHION,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights, for comparison.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Print zero-shot accuracy on digits, icons and fashion_mnist: half a minute of CPU."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tiny = model.new_model(tokenizer, 0) if random else CLIPModel.from_pretrained(folder)
    torch.set_grad_enabled(False)
    suite = evaluate.Suite(icons, fashion)
    figures = suite(tiny, tokenizer)
    if as_json:
        print(json.dumps(figures))
        return
    for name, figure in figures.items():
        pictures, _, names = suite.sets[name]
        print(f"{name:14} {figure:.4f}  ({len(pictures)} pictures, {len(names)} classes)")
        print(f"{'':14} templates: {', '.join(repr(t) for t in evaluate.TEMPLATES[name])}")
    if "fashion_mnist" not in figures:
        print(f"fashion_mnist  left out: {fashion} does not hold it")


if __name__ == "__main__":
    typer.run(main)
