"""One rule, several doors: adapters, merged weights, pixels, prompts and cards."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import CLIPModel

import fedclip
from fedclip import create_clip_model, open_adapter
from fedclip.adapters.card import run_card
from fedclip.adapters.export import export
from fedclip.adapters.load import load_run_model
from fedclip.adapters.merge import merge
from fedclip.data.rgb import open_rgb
from fedclip.errors import FedclipWarning, UsageError
from fedclip.models.adapter_card import code, markdown
from fedclip.models.adapter_folder import read_adapter
from fedclip.models.clip import CLIPLoRAWrapper
from fedclip.models.peft_config import check_peft_config

NAMES = ["cat", "dog", "bird"]
LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": {"vision_encoder": ["q_proj", "fc1"], "text_encoder": ["q_proj"]},
}
PIXELS = torch.randint(
    0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
)


def trained(**lora: Any) -> CLIPLoRAWrapper:
    model = create_clip_model({"model_name": "tiny", "lora": LORA | lora}, class_names=NAMES)
    draw = torch.Generator().manual_seed(1)
    state = model.get_parameters()
    model.set_parameters(
        {n: t + 0.05 * torch.randn(t.shape, generator=draw) for n, t in state.items()}
    )
    return model.eval()


def logits(model: CLIPLoRAWrapper) -> torch.Tensor:
    with torch.no_grad():
        return model(PIXELS)


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# --- DoRA, and what is merged ---


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}])
def test_merging_changes_no_logit_and_unmerging_no_byte(
    tmp_path: Path, lora: dict[str, Any]
) -> None:
    model = trained(**lora)
    before, weights = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    model.save_adapter(tmp_path / "adapter")
    model.merge_lora()
    assert gap(logits(model), before) <= 1e-5
    model.unmerge_lora()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert gap(logits(open_adapter(tmp_path / "adapter")), before) <= 1e-5
    export(tmp_path / "adapter", "merged", tmp_path / "merged")
    model.merge_lora()
    plain = CLIPModel.from_pretrained(tmp_path / "merged").state_dict()
    layer = "vision_model.encoder.layers.0.self_attn.q_proj"
    merged: Any = model.clip.get_submodule(layer)
    assert gap(plain[f"{layer}.weight"], merged.get_base_layer().weight) <= 1e-5


def test_adapters_with_magnitudes_are_not_merged_with_each_other(tmp_path: Path) -> None:
    for name in ("a", "b"):
        trained(use_dora=True).save_adapter(tmp_path / name)
    with pytest.raises(UsageError, match="uses use_dora, which fedclip does not merge"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


def test_a_merged_model_gives_and_takes_no_state_dict() -> None:
    model = trained()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_lora()
    for door in (model, model.network, model.clip):
        with pytest.raises(UsageError, match="merged into the weights, so a state_dict would hold"):
            door.state_dict()
    with pytest.raises(UsageError, match="merged into the weights"):
        model.load_state_dict(state)
    model.unmerge_lora()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model.load_state_dict(state)


# --- foreign adapters ---


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that PEFT made and saved, whose base is called `tiny`."""
    torch.manual_seed(0)
    regex = r"vision_model\.encoder\.layers\.\d+\.self_attn\.q_proj"
    clip = CLIPModel.from_pretrained(fedclip.base_folder("tiny"))
    with warnings.catch_warnings():  # PEFT asks transformers by a deprecated name
        warnings.simplefilter("ignore", FutureWarning)
        peft = get_peft_model(clip, LoraConfig(r=4, lora_alpha=8, target_modules=regex))
    folder = tmp_path_factory.mktemp("foreign") / "adapter"
    peft.save_pretrained(folder)
    return folder


def changed(foreign: Path, place: Path, **values: Any) -> Path:
    place.mkdir()
    for file in foreign.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    config = json.loads((place / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "tiny"} | values
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


REFUSED = [
    *({"init_lora_weights": start} for start in ("pissa", "pissa_niter_4", "olora", "corda")),
    *({"init_lora_weights": start} for start in ("loftq", "lora_ga", "mica", "newest", 1)),
    *({"bias": "all"}, {"lora_bias": True}, {"fan_in_fan_out": True}, {"use_qalora": True}),
    *({"modules_to_save": ["x"]}, {"layer_replication": [[0, 2]]}, {"target_parameters": ["x"]}),
    *({"trainable_token_indices": [1]}, {"alora_invocation_tokens": [1]}, {"use_rslora": "yes"}),
    *({"revision": "abc"}, {"arrow_config": {"x": 1}}, {"megatron_config": {"x": 1}}),
    *({"ensure_weight_tying": True}, {"a_new_setting": 0.5}, {"peft_type": "LOHA"}),
]


@pytest.mark.parametrize("values", REFUSED, ids=str)
def test_settings_that_are_not_understood_are_refused_at_every_door(
    tmp_path: Path, foreign: Path, values: dict[str, Any]
) -> None:
    folder = changed(foreign, tmp_path / "adapter", **values)
    good = changed(foreign, tmp_path / "good")
    doors: list[Callable[[], object]] = [
        lambda: read_adapter(folder),
        lambda: trained().load_adapter(folder),
        lambda: open_adapter(folder),
        lambda: export(folder, "peft", tmp_path / "out"),
        lambda: export(folder, "merged", tmp_path / "out"),
        lambda: merge([good, folder], tmp_path / "out"),
    ]
    name = next(iter(values))
    for door in doors:
        with pytest.raises(UsageError, match=f"has {name}: |holds a LOHA adapter"):
            door()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"init_lora_weights": start, "a_new_setting": off}
        for start, off in ((True, None), (False, False), ("gaussian", {}), ("orthogonal", []))
    ]
    + [
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"task_type": "ANY"},
    ],
    ids=str,
)
def test_settings_that_are_understood(
    foreign: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    tensors, _, config = read_adapter(changed(foreign, tmp_path / "adapter", **values))
    assert tensors
    assert config is not None
    assert config | values == config


def test_what_peft_and_fedclip_write_is_understood(tmp_path: Path) -> None:
    check_peft_config(json.loads(json.dumps(LoraConfig().to_dict())), "peft")
    trained(use_dora=True, use_rslora=True).save_adapter(tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter")[2] is not None


# --- pixels ---


def _file(image: Image.Image, form: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **more)
    return buffer.getvalue()


def _pictures() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))
    wide = Image.fromarray(rng.integers(0, 65536, (40, 56), dtype=np.uint16))
    clear = Image.fromarray(rng.integers(0, 256, (40, 56, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "16-bit": _file(wide, "PNG"),
        "float": _file(Image.fromarray(rng.random((40, 56), np.float32)), "TIFF"),
        "alpha": _file(clear, "PNG"),
        "grey and alpha": _file(clear.convert("LA"), "PNG"),
        "palette": _file(clear.convert("P"), "GIF", transparency=3),
        "turned": _file(rgb, "JPEG", exif=exif, quality=95),
        "CMYK": _file(rgb.convert("CMYK"), "TIFF"),
        "one bit": _file(rgb.convert("1"), "PNG"),
        "plain": _file(rgb, "PNG"),
    }


@pytest.mark.parametrize("kind", _pictures())
def test_an_image_is_what_its_file_is_in_training(kind: str) -> None:
    model = create_clip_model({"model_name": "tiny"}, class_names=NAMES)
    data = _pictures()[kind]
    with Image.open(io.BytesIO(data)) as image:
        found = model.to_pixels([image])
    trained_on = open_rgb(io.BytesIO(data))
    assert np.array_equal(found, model.to_pixels([trained_on]))
    assert np.array_equal(found, model.to_pixels([np.asarray(trained_on)]))


def test_arrays_of_any_levels_and_channels() -> None:
    model = create_clip_model({"model_name": "tiny"}, class_names=NAMES)
    grey = np.arange(48 * 48).reshape(48, 48) % 256
    rgb = np.repeat(grey[:, :, None], 3, axis=2).astype(np.uint8)
    solid = np.dstack([rgb, np.full((48, 48), 255, np.uint8)])
    expected = model.to_pixels([rgb])
    for array in (grey, grey[:, :, None], (grey * 257).astype(np.uint16), grey / 255, rgb / 255.0):
        assert np.array_equal(model.to_pixels([array]), expected)
    for array in (rgb * 1.0, solid, np.float32(rgb), torch.from_numpy(rgb)):
        assert np.array_equal(model.to_pixels([array]), expected)
    assert model.to_pixels([np.zeros((48, 48, 4), np.uint8)]).min() == 255  # transparent: white


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 48, 48), np.uint8), "image 1 cannot be read: .*put the channels last"),
        (np.zeros((48, 48, 5), np.uint8), "image 1 cannot be read: expected .height, width"),
        (np.full((48, 48, 3), -0.5), "undo a normalisation first"),
        (np.full((48, 48), np.nan), "undo a normalisation first"),
        (np.zeros((0, 48), np.uint8), "image 1 cannot be read"),
        (np.zeros((48, 48), complex), "expected numbers"),
        (np.zeros((1, 500), np.uint8), "too narrow for a picture"),
        ("cat.png", "image 1 cannot be read"),
        (Image.open(io.BytesIO(_pictures()["plain"][:900])), "image 1 cannot be read"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, message: str) -> None:
    model = create_clip_model({"model_name": "tiny"}, class_names=NAMES)
    with pytest.raises(UsageError, match=message):
        model.to_pixels([np.zeros((48, 48), np.uint8), image])


# --- prompts ---

LONG = "very " * 90


@pytest.mark.parametrize(
    ("names", "templates"),
    [
        (["rose", "tulip"], [LONG + "{}"]),
        ([LONG + "old cat", LONG + "old dog"], None),
        (["Cat", "cat"], None),
        (["Café", "Cafe\u0301"], None),
        (["t-shirt", "T - shirt"], None),
    ],
)
@pytest.mark.filterwarnings("ignore:the text tower reads 77 tokens")
def test_classes_with_one_feature_are_refused(
    names: list[str], templates: list[str] | None
) -> None:
    model = create_clip_model({"model_name": "tiny"}, class_names=NAMES)
    with pytest.raises(UsageError, match=r"cannot tell the classes .* apart"):
        model.set_classes(names, templates)
    assert model.class_names == tuple(NAMES)


def test_a_prompt_that_loses_its_end_is_named() -> None:
    with pytest.warns(FedclipWarning, match=r"1 texts are longer.*'a photo of a old"):
        create_clip_model({"model_name": "tiny"}, class_names=["old " + LONG, "dog"])
    model = create_clip_model({"model_name": "tiny"}, class_names=["cat", "dog"])
    with pytest.warns(FedclipWarning, match="lose their end: 'very"):
        model.encode_texts([LONG, "a cat"])


def test_names_with_special_tokens_are_texts_like_others() -> None:
    names = ["cat", "cat<|endoftext|>", "cat<|endoftext|>dog", "<|startoftext|>cat"]
    model = create_clip_model({"model_name": "tiny"}, class_names=names)
    with torch.no_grad():
        features = model.text_features()
    same = features @ features.T > 1 - 1e-6
    assert torch.equal(same, torch.eye(4, dtype=torch.bool))


# --- cards ---


def test_the_card_of_a_linear_head_shows_how_to_load_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = {"vision_encoder": ["q_proj"]}
    config = {"model_name": "tiny", "lora": LORA | {"target_modules": vision}}
    for name, model in (
        ("lora", create_clip_model(config | {"num_classes": 3})),
        ("full", create_clip_model({**config, "num_classes": 3, "lora": {"enabled": False}})),
    ):
        folder = tmp_path / name
        model.save_adapter(folder)
        card = (folder / "README.md").read_text()
        assert "head.safetensors" in card
        snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)
        assert snippet is not None
        monkeypatch.chdir(tmp_path)
        Image.new("RGB", (40, 40), "red").save("photo.jpg")
        found: dict[str, Any] = {}
        exec(snippet[1].replace("<this folder>", str(folder)), found)
        expected = model(torch.from_numpy(found["pixels"])).softmax(dim=-1)
        assert torch.allclose(found["scores"], expected, atol=1e-5)


def test_the_card_of_a_simulation_says_so(finished_run: Path) -> None:
    card = run_card(finished_run)
    assert "in a simulated federation: one program read the images of all clients" in card
    assert "Counted, not sent: a client would send" in card
    assert "never images" not in card
    load_run_model(finished_run)


def test_names_in_a_card_are_no_markdown() -> None:
    assert markdown("a [x](http://y) <b> *c* | `d`") == r"a \[x\](http://y) \<b\> \*c\* \| \`d\`"
    assert markdown("t-shirt, size 4 (new)") == "t-shirt, size 4 (new)"
    assert code("a `{}`") == "`` a `{}` ``"
