"""Make the embedded model `tiny` from registry packages alone.

It takes about an hour on two CPU cores. What it needs is `@iconify/json`, which it
fetches with `npm pack`, and the fonts in matplotlib's package data. Stop it at any time: `--resume`
goes on from the last checkpoint.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.multiprocessing
import typer
from rich.console import Console
from tiny import captions, card, data, evaluate, families, glyphs, icons, model, pool, train
from transformers import CLIPModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[1]
ICONS = ROOT / "src/fedclip/data/icons"
# Said in prompts though no icon's name may say it; a vocabulary entry, not a training caption.
PROMPT_WORDS = (
    "t-shirt top trouser trousers pullover dress coat sandal shirt sneaker bag ankle boot fashion "
    "clothing clothes garment wear grayscale product item photo handwritten digit number letter"
)


def tokenizer_texts(package: Path) -> list[str]:
    """What the tokenizer is trained on: each family's captions, synonyms and prompt words."""
    texts = []
    for family in families.training_families(package):
        texts += sorted({captions.key_of(i.name) for i in families.read_family(package, family)})
    texts += [word for group in captions.SYNONYMS for word in group for _ in range(20)]
    prompts = captions.TEMPLATES + glyphs.DIGIT_CAPTIONS
    texts += [t.format("", n="") for t in prompts] * 200
    texts += [PROMPT_WORDS, " ".join(captions.DIGIT_NAMES)] * 200
    return texts


def main(
    work: Annotated[Path, typer.Option(help="Scratch folder: package, cache, checkpoints.")],
    out: Annotated[Path, typer.Option(help="Where the model goes.")] = ROOT
    / "src/fedclip/models/tiny",
    steps: Annotated[int, typer.Option(help="Steps of 512 pictures; about 0.6 s each.")] = 4800,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and augmentation.")] = 0,
    processes: Annotated[
        int, typer.Option(help="Processes that share a batch, one core each.")
    ] = 2,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    note: Annotated[str, typer.Option(help="A sentence on this run, for the card.")] = "",
    only_data: Annotated[bool, typer.Option(help="Stop once the data are made.")] = False,
) -> None:
    """Pretrain `tiny`: about an hour on two CPU cores, three minutes of data in it."""
    console = Console()
    work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    package = families.fetch_iconify(work)
    pool.build_pool(package, work, seed)
    pool.build_heldout(package, work)
    report = pool.mark_duplicates(work)
    console.print({k: v for k, v in report.items() if isinstance(v, int)})
    if not (ICONS / "icons.npz").exists():
        console.print(icons.build(package, ICONS))
    if not (work / "tokenizer/tokenizer.json").exists():
        model.train_tokenizer(tokenizer_texts(package), work / "tokenizer")
    console.print(f"data ready after {time.perf_counter() - started:.0f} s")
    if only_data:
        return
    settings = train.Settings(steps=steps, seed=seed, processes=processes)
    store = Path(tempfile.mkdtemp()) / "store"
    torch.multiprocessing.spawn(worker, (work, out, settings, resume, store), nprocs=processes)
    shutil.rmtree(store.parent)
    state = train.about(work / "checkpoint.safetensors")
    report |= data.Data(work, seed).counts()
    (work / "run.json").write_text(json.dumps(state | {"data": report, "note": note}, indent=1))
    describe(work, out, seed)


def describe(work: Path, out: Path, seed: int) -> None:
    """Measure the model zero-shot, beside random weights, and write its card."""
    torch.set_grad_enabled(False)
    tokenizer = CLIPTokenizer.from_pretrained(out)
    suite = evaluate.Suite(ICONS)
    figures = suite(CLIPModel.from_pretrained(out), tokenizer)
    untrained = suite(model.new_model(tokenizer, seed), tokenizer)
    card.write(out, work, families.fetch_iconify(work), figures, untrained)


def worker(
    rank: int, work: Path, out: Path, settings: train.Settings, resume: bool, store: Path
) -> None:
    """One of the processes that train. Each has one thread: they meet only once a step."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    where = {"init_method": f"file://{store}", "rank": rank, "world_size": settings.processes}
    dist.init_process_group("gloo", **where)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    made = [model.new_model(tokenizer, settings.seed) for _ in range(2)]
    run = train.Run(*made, settings)
    if resume:
        run.load(work / "checkpoint.safetensors")
    elif rank == 0:
        (work / "log.jsonl").unlink(missing_ok=True)
    pictures = data.Data(work, settings.seed)
    watch = train.Watch(pictures, tokenizer, work, ICONS, out) if rank == 0 else None
    train.fit(run, pictures, tokenizer, watch)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
