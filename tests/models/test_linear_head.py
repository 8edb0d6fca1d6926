"""A linear head alone on the frozen CLIP: against plain torch, in all engines and commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fedclip as package
from fedclip.adapters import inspect as inspection
from fedclip.adapters.card import run_card
from fedclip.adapters.export import export
from fedclip.adapters.load import load_run_model
from fedclip.adapters.merge import merge
from fedclip.config.loading import config_from_dict
from fedclip.errors import UsageError
from fedclip.experiment.build import build
from fedclip.experiment.run import Run, resume
from fedclip.federated.client import local_train
from fedclip.federated.local_steps import LocalSettings, plan_steps
from fedclip.models.adapter_folder import read_adapter
from fedclip.models.clip import create_clip_model
from fedclip.models.state import adapter_sha256
from fedclip.models.trainable import KINDS
from fedclip.reports.progress import Listener
from tests.support.models import NAMES, PROBE, some_pixels
from tests.support.runs import StopAfter, with_

HEAD = {"head.bias", "head.weight"}
NUMBERS = 10 * 128 + 10  # ten classes, embeddings of 128


def probe(**sections: Any) -> dict[str, Any]:
    """A short run that trains a linear head alone."""
    return with_(
        **{"federation": {"rounds": 2}, "evaluation": {"keep_best": False}, **sections}
    ) | {"model": {"model_name": "tiny", **PROBE}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of the batched engine."""
    return package.run(probe(), output=tmp_path_factory.mktemp("probe") / "run")


def test_every_kind_is_known_by_its_name() -> None:
    assert {name: kind.name for name, kind in KINDS.items()} == {n: n for n in KINDS}
    assert set(KINDS) == {"lora", "head", "full"}
    for kind in KINDS.values():
        config = config_from_dict({"model": kind.model_keys}).model
        assert config.trains == kind.name


def test_sgd_on_frozen_features_is_logistic_regression() -> None:
    """The same head as by plain torch on features that were computed once, with the same draws."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 3, 32, 32), np.uint8)
    labels, indices = rng.integers(0, 3, 40), np.arange(5, 40)
    model = create_clip_model({"model_name": "tiny", **PROBE}, class_names=NAMES)
    with torch.no_grad():
        features = model.clip.get_image_features(
            pixel_values=model.normalised(torch.from_numpy(pixels))
        )
    features = getattr(features, "pooler_output", features)
    start = model.get_parameters()
    weight, bias = (start[f"head.{n}"].requires_grad_() for n in ("weight", "bias"))
    settings = LocalSettings(
        local_epochs=3, batch_size=8, optimizer="sgd", learning_rate=0.5, weight_decay=0.01,
        max_grad_norm=None,
    )  # fmt: skip
    for (batch,) in plan_steps(indices, settings, 7):
        logits = features[batch] @ weight.T + bias
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[batch]))
        gradients = torch.autograd.grad(loss, (weight, bias))
        with torch.no_grad():  # the bias does not decay
            weight -= 0.5 * (gradients[0] + 0.01 * weight)
            bias -= 0.5 * gradients[1]
    local_train(model, pixels, labels, indices, settings, seed=7, device=torch.device("cpu"))
    trained = model.get_parameters()
    assert trained.keys() == HEAD
    assert (trained["head.weight"] - weight).abs().max() <= 1e-5
    assert (trained["head.bias"] - bias).abs().max() <= 1e-5
    moved = create_clip_model({"model_name": "tiny", **PROBE}, class_names=NAMES)
    assert (trained["head.weight"] - moved.get_parameters()["head.weight"]).abs().max() > 0.01


def test_both_engines_train_the_same_head(run: Run, tmp_path: Path) -> None:
    other = package.run(probe(engine={"name": "sequential"}), output=tmp_path / "run")
    assert (run.summary["engine"], other.summary["engine"]) == ("batched", "sequential")
    mine, theirs = (load_file(r.adapter / "head.safetensors") for r in (run, other))
    assert mine.keys() == theirs.keys() == HEAD
    for name in HEAD:
        # AdamW divides by gradients near zero: there fp32 rounding grows.
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-4)
    assert run.summary["accuracy"] == pytest.approx(other.summary["accuracy"])


def test_nothing_but_the_head_trains_and_travels(run: Run) -> None:
    facts = inspection.info(run.folder)
    numbers = NUMBERS
    assert facts["trainable_parameters"] == facts["head_parameters"] == numbers
    assert facts["lora_parameters"] == 0
    assert facts["bytes_up_per_client_round"] == facts["bytes_down_per_client_round"] == 4 * numbers
    assert run.summary["bytes_up_per_client_round"] == 4 * numbers
    assert 4 * numbers < facts["message_bytes_up_per_site_round"] < 4 * numbers + 2000
    assert run.summary["accuracy"] > run.summary["initial_accuracy"]


def test_the_prefix_cache_holds_what_the_whole_tower_makes() -> None:
    context = build(config_from_dict(probe()), Listener())
    assert context.config.engine.prefix_cache == "memory"
    rows = np.arange(3)
    context.images.prepare(rows)
    embedded = context.model.embed(torch.from_numpy(context.data.pixels[rows]))
    torch.testing.assert_close(context.images.take(rows), embedded, rtol=1e-5, atol=1e-5)


def test_the_folder_holds_the_head_and_its_card_loads_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40), "red").save("photo.jpg")
    assert sorted(path.name for path in run.adapter.iterdir()) == [
        "README.md",
        "fedclip.json",
        "head.safetensors",
    ]
    assert json.loads((run.adapter / "fedclip.json").read_text())["trained"] == "head"
    expected = load_run_model(run.folder)
    for text in ((run.adapter / "README.md").read_text(), run_card(run.folder)):
        assert "linear head" in text.lower()
        code = text.split("```python\n")[1].split("```")[0]
        assert "peft" not in code.lower()
        scope: dict[str, Any] = {}
        exec(code.replace("<this folder>", str(run.adapter)), scope)
        assert torch.equal(scope["model"](some_pixels()), expected(some_pixels()))
        assert scope["model"].class_names == expected.class_names
    base = create_clip_model({"model_name": "tiny", **PROBE}, class_names=expected.class_names)
    assert not torch.equal(base(some_pixels()), expected(some_pixels()))
    assert expected.get_lora_info() == {"enabled": False, "trainable_parameters": 0}


def test_a_finished_run_is_evaluated_and_exported(run: Run, tmp_path: Path) -> None:
    again = inspection.evaluate(run.folder, detail=True)
    assert again["accuracy"] == pytest.approx(run.summary["accuracy"])
    assert again["detail"]["base"]["accuracy"] == pytest.approx(run.summary["zero_shot_accuracy"])
    export(run.folder, "merged", tmp_path / "plain")
    head = load_file(tmp_path / "plain" / "head.safetensors")
    assert adapter_sha256(head) == run.summary["adapter_sha256"]


def test_what_needs_an_adapter_says_so(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds a linear head alone, no PEFT adapter"):
        export(run.folder, "peft", tmp_path / "peft")
    with pytest.raises(UsageError, match=r"holds a linear head alone, expected a LoRA adapter"):
        merge([run.folder, run.folder], tmp_path / "merged")
    model = load_run_model(run.folder)
    assert not model.is_lora_enabled()
    for call in (model.merge_lora, lambda: model.set_rank(2)):
        with pytest.raises(UsageError, match="trains a linear head alone"):
            call()


def test_a_lora_folder_that_lost_its_adapter_is_not_a_head(tmp_path: Path) -> None:
    lora = create_clip_model({"head": "linear"}, class_names=NAMES)
    lora.save_adapter(tmp_path / "adapter")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "adapter" / name).unlink()
        with pytest.raises(UsageError, match="holds no adapter"):
            read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": PROBE | {"head": "text"}}, r"names no layer, so nothing would be trained"),
        ({"model": PROBE | {"head": "auto"}}, r"set head: linear to train a linear head alone"),
        ({"federation": {"strategy": "flora"}}, r"flora combines LoRA factors.*names no layer"),
        ({"federation": {"client_ranks": {"default": 2}}}, r"client_ranks needs an adapter"),
        ({"federation": {"dynamic_ranks": {"enabled": True}}}, r"dynamic_ranks.* needs an adapter"),
        ({"federation": {"sharing": {"mode": "clusters"}}}, r"clusters needs an adapter"),
        ({"evaluation": {"other_data": ["icons"]}}, r"other_data needs a classifier"),
    ],
)
def test_configurations_that_do_not_fit_a_head_alone(values: dict[str, Any], message: str) -> None:
    whole = {"model": PROBE, "data": {"name": "digits"}} | values
    with pytest.raises(UsageError, match=message):
        config_from_dict(whole)


def test_layers_of_the_other_tower_are_no_empty_selection() -> None:
    text = {"lora": {"target_modules": {"text_encoder": ["q_proj"]}}}
    assert config_from_dict({"model": text}).model.trains == "lora"
    flora = {"model": text, "federation": {"strategy": "flora"}}
    assert config_from_dict(flora).federation.strategy == "flora"
    none = {"head": "linear", "lora": {"target_modules": {"vision_encoder": []}, "r": 4}}
    assert config_from_dict({"model": none}).model.trains == "head"


@pytest.mark.parametrize(
    "sections",
    [
        {"federation": {"rounds": 1, "ditto_mu": 0.1}},
        {"federation": {"rounds": 1, "server_optimizer": {"name": "adam"}}},
        {"federation": {"rounds": 1, "scaffold": True}, "optimizer": {"name": "sgd"}},
        {"federation": {"rounds": 1, "strategy": "local"}},
        {"federation": {"rounds": 1, "strategy": "centralised"}},
        {"federation": {"rounds": 1, "strategy": "qfedavg"}},
    ],
    ids=["ditto", "adam", "scaffold", "local", "centralised", "qfedavg"],
)
def test_what_takes_any_tensors_takes_a_head(sections: dict[str, Any], tmp_path: Path) -> None:
    found = package.run(probe(**sections), output=tmp_path / "run")
    assert found.summary["trainable_parameters"] == NUMBERS


def test_a_stopped_run_goes_on_to_the_same_head(run: Run, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        package.run(probe(), output=tmp_path / "run", listener=StopAfter(1))
    again = resume(tmp_path / "run")
    assert again.summary["state_sha256"] == run.summary["state_sha256"]
