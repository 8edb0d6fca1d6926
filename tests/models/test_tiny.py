"""The embedded model and the icons data set are what their card says."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src/fedclip"
TINY = PACKAGE / "models/tiny"
ICONS = PACKAGE / "data/icons"


@pytest.fixture(scope="module")
def model() -> CLIPModel:
    return CLIPModel.from_pretrained(TINY).eval()


@pytest.fixture(scope="module")
def processor() -> CLIPProcessor:
    return CLIPProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def icons() -> dict[str, np.ndarray]:
    with np.load(ICONS / "icons.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_model_opens_and_embeds(model: CLIPModel, processor: CLIPProcessor) -> None:
    picture = Image.new("RGB", (100, 60), "white")
    inputs = processor(
        text=["a truck", "an icon of a shopping cart"],
        images=[picture],
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad():
        out = model(**inputs)
    assert out.logits_per_image.shape == (1, 2)
    assert out.logits_per_image.isfinite().all()
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)


def test_folder_is_small() -> None:
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 12_000_000
    assert (ICONS / "icons.npz").stat().st_size <= 4_000_000


def test_vision_tower_is_light(model: CLIPModel) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.vision_model(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() <= 30_000_000


def test_text_pools_at_the_true_end(model: CLIPModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    config = model.config.text_config
    assert config.eos_token_id == tokenizer.eos_token_id != 2
    assert config.bos_token_id == tokenizer.bos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id
    assert len(tokenizer) <= config.vocab_size
    ids = tokenizer("an ankle boot")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    # What follows the end, padding included, changes nothing.
    texts = ["a key", "a photo of a handwritten digit, by someone in a hurry"]
    with torch.no_grad():
        alone = model.text_model(**tokenizer(texts[:1], return_tensors="pt")).pooler_output
        padded = model.text_model(**tokenizer(texts, padding=True, return_tensors="pt"))
    torch.testing.assert_close(alone[0], padded.pooler_output[0], atol=1e-5, rtol=1e-4)


def test_tokenizer_is_a_subword_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert tokenizer.tokenize("Shopping Cart") == ["shopping</w>", "cart</w>"]
    for text in ("naïve café", "unheardofishly", "汉字"):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) > 3
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_icons_counts(icons: dict[str, np.ndarray]) -> None:
    count = len(icons["images"])
    assert count >= 4500
    assert icons["images"].shape == (count, 32, 32)
    assert icons["images"].dtype == np.uint8
    assert int((icons["split"] == 1).sum()) >= 1500
    assert len(icons["family_names"]) >= 24
    assert len(icons["class_names"]) >= 40
    assert set(icons["label"].tolist()) == set(range(len(icons["class_names"])))


def test_every_family_has_thirty_concepts(icons: dict[str, np.ndarray]) -> None:
    for family in range(len(icons["family_names"])):
        mine = icons["family"] == family
        assert len(set(icons["label"][mine].tolist())) >= 30
        assert 0.25 < icons["split"][mine].mean() < 0.45


def test_split_keeps_drawings_together(icons: dict[str, np.ndarray]) -> None:
    sides = defaultdict(set)
    for drawing, side in zip(icons["drawing"].tolist(), icons["split"].tolist(), strict=True):
        sides[drawing].add(side)
    assert all(len(found) == 1 for found in sides.values())
    train = {i.tobytes() for i in icons["images"][icons["split"] == 0]}
    assert not any(i.tobytes() in train for i in icons["images"][icons["split"] == 1])


def test_held_out_families_were_not_trained_on(icons: dict[str, np.ndarray]) -> None:
    card = (TINY / "README.md").read_text(encoding="utf-8")
    used = card.split("## Families used")[1]
    trained = set(re.findall(r"^\| `([^`]+)` \|", used, flags=re.MULTILINE))
    held = set(icons["family_names"].tolist())
    assert len(trained) > 50
    assert not trained & held
    licences = (ICONS / "LICENSES.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in licences for name in held)


def test_no_group_of_families_straddles_the_line(
    icons: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    families = importlib.import_module("tiny.families")
    held = set(families.HELD_OUT)
    assert set(icons["family_names"].tolist()) == held
    for group in families.GROUPS:
        assert len(set(group) & held) in (0, len(group)), group


def test_card_front_matter_is_the_hubs() -> None:
    card = (TINY / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    front = card.split("---\n")[1]
    assert "pipeline_tag: zero-shot-image-classification" in front
    assert "license:" in front


def zero_shot(*options: str | Path) -> dict[str, float]:
    """What `scripts/zero_shot_tiny.py` finds."""
    script = ROOT / "scripts/zero_shot_tiny.py"
    done = subprocess.run(
        [sys.executable, script, "--json", *options], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    return zero_shot()


@pytest.fixture(scope="module")
def card() -> dict[str, float]:
    """The card's table of accuracies."""
    text = (TINY / "README.md").read_text(encoding="utf-8")
    row = r"^\| (\w+) \| [\d,]+ \| \d+ \| \*\*([\d.]+)\*\* \|"
    rows = re.findall(row, text, flags=re.MULTILINE)
    return {name: float(figure) for name, figure in rows}


@pytest.mark.parametrize(("name", "least"), [("digits", 0.4), ("icons", 0.5), ("fashion_mnist", 0)])
def test_zero_shot_figures_are_those_of_the_card(
    figures: dict[str, float], card: dict[str, float], name: str, least: float
) -> None:
    if name == "fashion_mnist" and name not in figures:
        pytest.skip("Fashion-MNIST's files are not on this machine")
    assert figures[name] >= least
    # The card has three digits; another processor may turn a near tie or two.
    assert figures[name] == pytest.approx(card[name], abs=0.0015)


def test_random_weights_know_nothing(figures: dict[str, float], tmp_path: Path) -> None:
    untrained = zero_shot("--random", "--fashion", tmp_path / "none")
    assert set(untrained) == {"digits", "icons"}
    for name, figure in untrained.items():
        assert figures[name] > 4 * figure
