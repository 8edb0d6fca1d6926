"""The model card: every number in it comes from a run's files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from . import data, dedupe, families, pool

ICONS = Path(__file__).resolve().parents[2] / "src/fedclip/data/icons"

HEAD = """---
library_name: transformers
pipeline_tag: zero-shot-image-classification
license: apache-2.0
language: en
tags: [clip, vision, federated-learning]
model_name: tiny
---

# tiny

A CLIP of {parameters:,} parameters ({megabytes:.1f} MB) for laptops, tests and teaching: two CPU
cores can train it. The vision tower sees 32 x 32 pixels in patches of 8 (4 layers, 4 heads, 128
wide: {megaflops:.1f} MFLOP forward an image, multiply and add counted as two). The text tower reads
a byte-level BPE of {vocabulary:,} tokens (2 layers, 128 wide, at most 77 tokens). Both project to
128 dimensions. Trained from random weights on real image-text pairs, it knows icons, letters and
digits; it is no model of photographs.

```python
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("src/fedclip/models/tiny")
processor = CLIPProcessor.from_pretrained("src/fedclip/models/tiny")
```

## Zero-shot accuracy

| Data | Pictures | Classes | Accuracy | Random weights | Chance |
| --- | ---: | ---: | ---: | ---: | ---: |
{figures}

One command prints these figures and their prompts (with `--random`, those of random weights):

```sh
python scripts/zero_shot_tiny.py
```

- `digits`: scikit-learn's handwritten digits, all of them, 8 x 8 pixels as they come.
- `icons`: the test split of the `icons` data set, {concepts} concepts as {held} families draw them;
  none of these families was trained on.
- `fashion_mnist`: the test set as it comes, clothing photographs, of which training saw none.
"""

DATA = """
## Training data

- **Icons**: {kept:,} renderings of icons with their names, from {used} permissively licensed
  families of `{package}` {version}. Of {rendered:,} rendered (at most {per_key} of one name in
  a family), {removed:,} were removed as near-duplicates of held-out drawings, and {validation:,}
  kept back for validation. Captions are an icon's name without style words, its aliases, synonyms
  from a small table, and templates. Logos, brands, coins, flags and file types are left out.
- **Letters, digits and words** in the fonts that matplotlib ships (DejaVu, STIX, Computer Modern).

Polarity, colour, stroke, rotation, shear, elastic bend, blur, noise and low resolution are varied.

### Held out

- {held} whole icon families: {held_names}.
- All handwriting, and all photographs, of clothing or of anything else.

Families known to share drawings (versions, forks, editions of one set) stay on one side of the
line: {groups}.

No author whom the package names has families on both sides, but one person may stand behind two
names: `zondicons` (held out) is by Steve Schoger, and `heroicons` (trained on) by Refactoring UI,
of which he is a founder.

What names do not tell, an image hash does: 256 bits of the ink, cropped to its box. A training
rendering within {near} bits of any of the {held_icons:,} renderings of held-out families was
removed, which takes many plain arrows and circles along.
"""

TRAINING = """
## Training

{steps:,} steps of {batch} pictures took {minutes:.0f} minutes on two CPU cores that had other work
to do as well ({processes} processes, seed {seed}). AdamW, learning rate {rate} with {warmup} steps
of warm-up and half a cosine, weight decay {decay}; the weights shipped are a moving average
({average}). The loss is CLIP's, where pictures whose captions say the same are positives of one
another, and pairs where one caption contains the other are left out.

Schedule and augmentation were set before the run, from what is common for small CLIP models; the
number of steps is what the time allowed.{note} Digits, held-out icons and fashion_mnist were
logged on the way (the latter's first 2,000 pictures) and chose nothing. Validation is zero-shot
over the {keys} commonest names of the training families, on drawings kept back from training.

| Step | Minutes | Loss | Validation | Digits | Icons | Fashion |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{history}

`scripts/pretrain_tiny.py` makes such a model again from the registry package alone. The seed fixes
the data, weights and batches; the tokenizer library breaks ties between merges arbitrarily, so that
another run's weights are not bit-equal.

## Limits

It has seen drawings, and tells things apart by their shape. Do not use it to identify people, nor
for any decision about them.

## Families used, and their licences

The weights are the project's, under Apache-2.0. The pictures that they were trained on keep their
authors' licences:

| Family | Name | Author | Licence | Pictures |
| --- | --- | --- | --- | ---: |
{licences}

Held-out families and their licences are listed in `src/fedclip/data/icons/LICENSES.md`.
"""


def write(folder: Path, work: Path, package: Path, figures: dict, untrained: dict) -> None:
    """Write `README.md` to a model folder, from its run's files and two sets of figures."""
    run = json.loads((work / "run.json").read_text())
    settings, report = run["settings"], run["data"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    config = json.loads((folder / "config.json").read_text())
    with np.load(ICONS / "icons.npz", allow_pickle=False) as icons:
        sizes = {"icons": (int(icons["split"].sum()), len(icons["class_names"]))}
    sizes |= {"digits": (1797, 10), "fashion_mnist": (10000, 10)}
    counts = report["icons used of each family"]
    size = sum(f.stat().st_size for f in folder.iterdir() if f.name != "README.md")
    text = (HEAD + DATA + TRAINING).format(
        parameters=sum(t.numel() for t in tensors),
        megabytes=size / 1e6,
        megaflops=megaflops(config),
        vocabulary=config["text_config"]["vocab_size"],
        figures=figure_rows(figures, untrained, sizes),
        concepts=sizes["icons"][1],
        held=len(families.HELD_OUT),
        held_names=", ".join(f"`{name}`" for name in families.HELD_OUT),
        groups="; ".join(", ".join(f"`{name}`" for name in group) for group in families.GROUPS),
        package=families.ICONIFY,
        version=families.ICONIFY_VERSION,
        per_key=pool.PER_KEY,
        near=dedupe.NEAR,
        kept=sum(counts.values()),
        used=sum(1 for n in counts.values() if n),
        rendered=report["training icons"],
        removed=report["removed as near-duplicates"],
        held_icons=report["held-out renderings"],
        validation=report["kept back for validation"],
        keys=data.VALIDATION_KEYS,
        steps=run["step"],
        minutes=run["seconds"] / 60,
        batch=settings["batch_size"],
        rate=settings["learning_rate"],
        decay=settings["weight_decay"],
        warmup=settings["warmup"],
        average=settings["average"],
        processes=settings["processes"],
        seed=settings["seed"],
        note=f" {run['note']}" if run.get("note") else "",
        history=history_rows(work / "log.jsonl"),
        licences=licence_rows(package, counts),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def megaflops(config: dict) -> float:
    """Forward operations of the vision tower for one image, multiply and add counted as two."""
    tower = CLIPVisionModel(CLIPVisionConfig(**config["vision_config"])).eval()
    size = config["vision_config"]["image_size"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() / 1e6


def figure_rows(figures: dict, untrained: dict, sizes: dict[str, tuple[int, int]]) -> str:
    """The table of zero-shot accuracies."""
    return "\n".join(
        f"| {name} | {sizes[name][0]:,} | {sizes[name][1]} | **{value:.3f}** "
        f"| {untrained[name]:.3f} | {1 / sizes[name][1]:.3f} |"
        for name, value in figures.items()
    )


def history_rows(log: Path, rows: int = 14) -> str:
    """A sample of the training log, the last line always in it."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    every = max(1, len(lines) // rows)
    chosen = lines[::-1][::every][::-1]
    return "\n".join(
        f"| {r['step']:,} | {r['seconds'] / 60:.0f} | {r['loss']:.2f} | {r['validation']:.3f} "
        f"| {r['digits']:.3f} | {r['icons']:.3f} | {r.get('fashion_mnist', float('nan')):.3f} |"
        for r in chosen
    )


def licence_rows(package: Path, counts: dict[str, int]) -> str:
    """One row a training family."""
    known = families.collections(package)
    return "\n".join(
        f"| `{f}` | {known[f]['name']} | {known[f]['author']['name']} "
        f"| {known[f]['license']['spdx']} | {counts[f]:,} |"
        for f in families.training_families(package)
        if counts.get(f)
    )
