"""Where a base model comes from: the package, a folder, the hub's cache, or random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from fedclip.errors import FedclipWarning, UsageError
from fedclip.models.architectures import OPENAI_CLIP, openai_config
from fedclip.models.pretrained import base_folder, load_base, load_pixels
from fedclip.models.tokenizer import Tokens, remapped


def small_config(folder: Path, **text: int) -> Path:
    """A folder with a config.json alone, of a CLIP that is made in no time."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    tower["num_hidden_layers"] = 1
    config = CLIPConfig(
        text_config=tower | {"vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49} | text,
        vision_config=tower | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_folder("tiny"), tmp_path / "copy"))


def test_tiny_is_a_folder_that_transformers_opens() -> None:
    model = CLIPModel.from_pretrained(base_folder("tiny"))
    assert sum(p.numel() for p in model.parameters()) > 1_000_000
    with pytest.raises(UsageError, match="no embedded model is called 'huge'; there is: tiny"):
        base_folder("huge")


def test_a_folder_is_read_like_the_embedded_model(tiny_copy: Path) -> None:
    base, other = load_base("tiny"), load_base(str(tiny_copy))
    assert (base.name, other.name) == ("tiny", str(tiny_copy))
    for ours, theirs in zip(base.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not base.model.training
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("openai/clip-vit-base-patch32", 151_277_313),
        ("openai/clip-vit-base-patch16", 149_620_737),
        ("openai/clip-vit-large-patch14", 427_616_513),
        ("openai/clip-vit-large-patch14-336", 427_944_193),
    ],
)
def test_parameters_of_the_published_models(name: str, count: int) -> None:
    with torch.device("meta"):
        model = CLIPModel(openai_config(name))
    assert sum(p.numel() for p in model.parameters()) == count


def test_random_weights_are_seeded_and_leave_the_global_generator_alone(tmp_path: Path) -> None:
    name = f"random:{small_config(tmp_path)}"
    before = torch.get_rng_state()
    first, again, other = (load_base(name, seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    state = first.state_dict()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in state.items())
    weight = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(state[weight], other.state_dict()[weight])


def test_random_tiny_has_the_embedded_architecture_and_tokenizer() -> None:
    random, tiny = load_base("random:tiny"), load_base("tiny")
    assert random.tokens.encode(["a photo of a cat"]) == tiny.tokens.encode(["a photo of a cat"])
    assert random.pixels.key == tiny.pixels.key
    shapes = [p.shape for p in tiny.model.parameters()]
    assert [p.shape for p in random.model.parameters()] == shapes


def test_random_models_read_text_between_their_own_ends(tmp_path: Path) -> None:
    [row] = load_base(f"random:{small_config(tmp_path)}").tokens.encode(["a photo of a cat"])
    assert (row[0], row[-1]) == (48, 49)
    assert all(0 <= index < 48 for index in row[1:-1])
    assert len(row) > 4


def test_legacy_end_id_of_openai_means_the_largest_id(tmp_path: Path) -> None:
    folder = small_config(tmp_path, bos_token_id=0, eos_token_id=2)
    tokens = load_base(f"random:{folder}").tokens
    assert (tokens.begin, tokens.end) == (48, 49)


def test_folding_keeps_ids_that_fit() -> None:
    source = Tokens(lambda texts: [[1, 7, 30]] * len(texts), begin=98, end=99, max_length=9)
    tokens = remapped(source, vocab_size=10, begin=7, end=9, max_length=9)
    # Free ids are 0-6 and 8: 7 is taken and becomes free[7] = 8, 30 becomes free[30 % 8] = 6.
    assert tokens.encode(["x"]) == [[7, 1, 8, 6, 9]]


def test_long_prompts_lose_words_but_not_their_end() -> None:
    tokens = load_base("tiny").tokens
    with pytest.warns(FedclipWarning, match=r"reads 77 tokens of a text, and 1 texts .*'cat cat"):
        [row] = tokens.encode(["cat " * 200, "cat"])[:1]
    assert tokens.encode(["cat " * 200]) == [row]  # told once
    assert len(row) == tokens.max_length
    assert (row[0], row[-1]) == (tokens.begin, tokens.end)


def test_tokens_are_those_of_the_tokenizer_padded_to_the_longest() -> None:
    tokens = load_base("tiny").tokens
    texts = ["a cat", "a photo of a large red bicycle"]
    rows = tokens.encode(texts)
    assert rows == AutoTokenizer.from_pretrained(base_folder("tiny"))(texts)["input_ids"]
    assert tokens.pad(rows).shape == (2, len(rows[1]))


def test_pixels_are_those_of_the_library() -> None:
    drawn = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    pixels = load_pixels("tiny")
    made = torch.from_numpy(pixels.to_pixels([drawn, Image.fromarray(drawn)]))
    assert made.dtype == torch.uint8
    assert torch.equal(made[0], made[1])
    processor = CLIPImageProcessorPil.from_pretrained(base_folder("tiny"))
    expected = processor(Image.fromarray(drawn), return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (pixels.mean, pixels.std))
    torch.testing.assert_close((made[0] * pixels.scale - mean) / std, expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA"])
def test_pixels_of_any_image_mode_are_rgb(mode: str) -> None:
    pixels = load_pixels("tiny")
    image = Image.new("RGB", (20, 30), "red").convert(mode)
    assert pixels.to_pixels([image]).shape == (1, 3, pixels.image_size, pixels.image_size)


def test_pixels_key_tells_preprocessings_apart(tmp_path: Path) -> None:
    keys = {
        load_pixels(name).key
        for name in (
            "tiny",
            f"random:{small_config(tmp_path)}",
            "random:" + next(iter(OPENAI_CLIP)),
        )
    }
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no-such-folder", "folder no-such-folder does not exist"),
        ("random:openai/clip-vit-huge", "openai/clip-vit-base-patch32"),
        ("not a hub id", "cannot load not a hub id: tried a folder of that name"),
    ],
)
def test_a_name_that_leads_nowhere(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_base(name)


def test_a_hub_model_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True, raising=False)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE=1 only the cache is read") as caught:
        load_base("nobody/no-such-clip")
    assert "hf download nobody/no-such-clip" in str(caught.value)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json in it"):
        load_base(str(tmp_path))


def test_another_kind_of_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(UsageError, match="type 'siglip'; fedclip fine-tunes CLIP"):
        load_base(str(tmp_path))


def test_pickled_weights_are_refused(tiny_copy: Path) -> None:
    (tiny_copy / "model.safetensors").unlink()
    torch.save({}, tiny_copy / "pytorch_model.bin")
    with pytest.raises(UsageError, match="pickled weights"):
        load_base(str(tiny_copy))


def test_broken_weights(tiny_copy: Path) -> None:
    weights = tiny_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot load"):
        load_base(str(tiny_copy))


def test_a_tokenizer_of_another_model(tiny_copy: Path) -> None:
    config = json.loads((tiny_copy / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 5
    (tiny_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="does not fit its text tower"):
        load_base(str(tiny_copy))


def test_loading_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    load_base("tiny")
    assert capfd.readouterr() == ("", "")
