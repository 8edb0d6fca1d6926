"""Adapter folders merged into one: what comes out, and what cannot be merged."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

import fedclip as package
from fedclip import base_folder
from fedclip.adapters import merge_search as weight_search
from fedclip.adapters.inspect import evaluate
from fedclip.adapters.merge import merge, read_adapters
from fedclip.adapters.merge_search import Validation
from fedclip.errors import UsageError
from fedclip.models.adapter_merge import check_recipe, combine
from fedclip.models.adapter_updates import open_adapter, read_lora
from fedclip.models.clip import create_clip_model
from fedclip.reports.listener import Listener
from tests.conftest import Command
from tests.support.models import FULL, NAMES, shaken, some_pixels
from tests.support.runs import with_

SEARCHED = {
    "model": {"model_name": "tiny"},
    "federation": {"rounds": 2},
    "data": {"validation_fraction": 0.3},
}
TARGETS = {"vision_encoder": ["q_proj", "fc1"], "text_encoder": ["v_proj"]}


def save(folder: Path, seed: int = 0, rank: int = 2, **how: Any) -> Path:
    """An adapter folder with random tensors."""
    lora = {"r": rank, "lora_alpha": 2 * rank, "target_modules": TARGETS}
    model_config = {
        "lora": lora | how.pop("lora", {}),
        "model_name": how.pop("base", "tiny"),
        "head": how.pop("head", "auto"),
    }
    how = {"class_names": NAMES, "seed": how.pop("base_seed", 0)} | how
    model = create_clip_model(model_config, **how)
    model.set_parameters(shaken(model, seed))
    model.save_adapter(folder)
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return save(tmp_path / "a", 1, rank=2), save(tmp_path / "b", 2, rank=4)


def products(folder: Path) -> dict[str, torch.Tensor]:
    return {path: b @ a for path, (a, b) in read_lora(folder).layers.items()}


def edit(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("method", "rank"), [("cat", 6), ("svd", 4), ("ties", 4), ("dare", 4), ("knots", 4)]
)
def test_different_ranks_give_one_adapter(
    tmp_path: Path, pair: tuple[Path, Path], method: str, rank: int
) -> None:
    facts = merge(pair, tmp_path / "out", method=method)
    merged = read_lora(tmp_path / "out")
    assert facts["rank"] == merged.rank == rank
    assert {len(a) for a, _ in merged.layers.values()} == {rank}
    assert merged.layers.keys() == read_lora(pair[0]).layers.keys()
    assert merged.notes.class_names == tuple(NAMES)
    assert facts["kept_energy"] == 1 if method == "cat" else 0.3 < facts["kept_energy"] < 1
    again = merge(pair, tmp_path / "again", method=method)
    assert again == facts | {"output": str(tmp_path / "again")}
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_cat_is_the_weighted_sum_to_the_last_logit(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(pair, tmp_path / "out", method="cat", weights=[0.75, -0.5])
    one, two, found = (products(folder) for folder in (*pair, tmp_path / "out"))
    for path, product in found.items():
        torch.testing.assert_close(product, 0.75 * one[path] - 0.5 * two[path])
    # In a model, with scaling 1 of its own: the weights and that sum.
    by_hand = create_clip_model(FULL, class_names=NAMES)
    with torch.no_grad():
        for path, product in found.items():
            by_hand.clip.get_parameter(f"{path}.weight").add_(product)
        expected = by_hand(some_pixels())
        # A merged adapter brings its rank along.
        model = create_clip_model({"lora": {"r": 2, "target_modules": TARGETS}})
        model.load_adapter(tmp_path / "out")
        assert model.get_lora_info()["r"] == 6
        for ours in (model, open_adapter(tmp_path / "out")):
            difference = (ours(some_pixels()) - expected).abs().max()
            assert difference <= 1e-5 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_opens_the_result(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(pair, tmp_path / "out", method="svd", rank=3)
    peft = PeftModel.from_pretrained(
        CLIPModel.from_pretrained(base_folder("tiny")), tmp_path / "out"
    )
    with torch.no_grad():
        theirs = peft.get_base_model().get_image_features(some_pixels().float() / 255)
        ours = open_adapter(tmp_path / "out").clip.get_image_features(some_pixels().float() / 255)
    torch.testing.assert_close(theirs.pooler_output, ours.pooler_output)


def test_linear_of_equal_ranks(tmp_path: Path) -> None:
    one, two = save(tmp_path / "a", 1), save(tmp_path / "b", 2, class_names=["bus"])
    facts = merge([one, two], tmp_path / "out", method="linear", weights=[3, 1])
    (state, first, second) = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", one, two)
    )
    for name, value in state.items():
        factor = 4 * 2 if ".lora_B." in name else 1  # B: sum of weights, and lora_alpha / r
        torch.testing.assert_close(value, factor * (0.75 * first[name] + 0.25 * second[name]))
    assert facts["weights"] == [3, 1]
    assert read_lora(tmp_path / "out").notes.class_names == (*NAMES, "bus")


def test_dare_draws_by_seed(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    found = []
    for seed in (1, 2):
        merge(pair, tmp_path / str(seed), method="dare", seed=seed)
        found.append((tmp_path / str(seed) / "adapter_model.safetensors").read_bytes())
    assert found[0] != found[1]


def test_scales_by_layer_and_rslora_are_read(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", rank=4)
    (folder / "fedclip.json").unlink()  # whose digests would tell of the edits
    plain = products(folder)
    edit(folder, alpha_pattern={r"vision_model\.encoder\.layers\.1\.self_attn\.q_proj": 16})
    for path, product in products(folder).items():
        factor = 2 if path == "vision_model.encoder.layers.1.self_attn.q_proj" else 1
        torch.testing.assert_close(product, factor * plain[path])
    edit(folder, alpha_pattern={}, use_rslora=True)
    for path, product in products(folder).items():
        torch.testing.assert_close(product, math.sqrt(4) * plain[path])


def test_trained_heads_of_the_same_classes_are_averaged(tmp_path: Path) -> None:
    lora = {"target_modules": {"vision_encoder": ["q_proj"]}}
    one, two = (save(tmp_path / str(n), n, head="linear", lora=lora) for n in (1, 2))
    merge([one, two], tmp_path / "out", method="cat", weights=[3, 1])
    out, first, second = (load_file(f / "head.safetensors") for f in (tmp_path / "out", one, two))
    for name, value in out.items():
        torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * second[name])
    model = open_adapter(tmp_path / "out")
    assert torch.equal(model.classifier.weight, out["head.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mean"}, r"method must be one of linear, cat, svd, .*got 'mean'"),
        ({"method": "svd", "weights": [1]}, r"weights must be 2 finite numbers.*got 1"),
        ({"method": "svd", "weights": [1, math.nan]}, r"weights must be 2 finite numbers"),
        ({"method": "linear", "weights": [1, -1]}, r"must sum to more than 0, got 1, -1"),
        ({"method": "linear"}, r"adapters of the same rank, got 2, 4 in text_model"),
        ({"method": "cat", "rank": 3}, r"rank: cat has no rank to choose; svd is"),
        ({"method": "svd", "rank": 0}, r"rank must be at least 1, got 0"),
        ({"method": "svd", "density": 0.5}, r"density: svd has none; .*ties, dare, knots"),
        ({"method": "ties", "density": 0}, r"density must be above 0 and at most 1, got 0"),
        ({"method": "dare", "density": 1.5}, r"density must be above 0 and at most 1, got 1\.5"),
    ],
)
def test_bad_recipes(
    tmp_path: Path, pair: tuple[Path, Path], options: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        merge(pair, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_go_together(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    one = pair[0]
    vision = {"target_modules": {"vision_encoder": ["q_proj"]}}
    full = create_clip_model(FULL, class_names=NAMES)
    full.save_adapter(tmp_path / "full")
    for other, message in (
        (
            save(tmp_path / "base", base="random:tiny"),
            r"same base model: .* on random:tiny",
        ),
        (save(tmp_path / "less", lora=vision), r"same layers: text_model.* adapted in .*/a only"),
        (save(tmp_path / "head", head="linear", lora=vision), r"same layers"),
        (tmp_path / "full", r"full holds a full model, expected a LoRA adapter"),
        (tmp_path / "none", r"none holds no adapter"),
    ):
        with pytest.raises(UsageError, match=message):
            merge([one, other], tmp_path / "out", method="cat")
    with pytest.raises(UsageError, match="is one of the adapters to be merged; name another"):
        merge(pair, one, method="cat")
    with pytest.raises(UsageError, match="two adapters or more, got 1"):
        merge([one], tmp_path / "out", method="cat")
    linear, plain = (save(tmp_path / kind, head=kind, lora=vision) for kind in ("linear", "text"))
    with pytest.raises(UsageError, match="trained heads can be merged only where"):
        merge([linear, plain], tmp_path / "out", method="cat")
    seeds = [save(tmp_path / str(s), base="random:tiny", base_seed=s) for s in (1, 2)]
    with pytest.raises(UsageError, match=r"same base model: .*other weights of it"):
        merge(seeds, tmp_path / "out", method="cat")
    assert not (tmp_path / "out").exists()


def test_damaged_adapters(tmp_path: Path) -> None:
    folder = save(tmp_path / "a")
    (folder / "fedclip.json").unlink()  # whose digests would tell first
    weights = folder / "adapter_model.safetensors"
    state = load_file(weights)
    name = next(iter(state))
    layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    for change, message in (
        ({name: torch.zeros(3, 5)}, rf"A and B of {layer} do not fit"),
        ({name: torch.full_like(state[name], math.inf)}, rf"{layer} holds values that are not fin"),
        ({"base_model.model.other": torch.zeros(1)}, r"one A and B by layer \(base_model.model.o"),
    ):
        save_file(state | change, weights)
        with pytest.raises(UsageError, match=message):
            read_lora(folder)
    save_file({n: t for n, t in state.items() if n != name}, weights)
    with pytest.raises(UsageError, match="does not hold one A and B by layer"):
        read_lora(folder)
    save_file(state, weights)
    for values, message in (
        ({"use_dora": True}, r"one A and B by layer \(.*lora_magnitude_vector"),
        ({"bias": "all"}, "has bias: 'all' in its adapter_config.json"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number, got '8'"),
        ({"alpha_pattern": "8"}, "alpha_pattern must be a mapping: '8'"),
        ({"alpha_pattern": {"(": 8}}, r"alpha_pattern: '\(' is not a regular expression"),
        ({"peft_type": "IA3"}, "holds a IA3 adapter, expected a LoRA adapter"),
    ):
        before = (folder / "adapter_config.json").read_text()
        edit(folder, **values)
        with pytest.raises(UsageError, match=message):
            read_lora(folder)
        (folder / "adapter_config.json").write_text(before)


def test_the_command(fedclip: Command, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    code, printed, _ = fedclip(
        "merge", *pair, "--output", out, "--method", "ties", "--weights", "1,0.5",
        "--rank", "3", "--density", "0.4", "--json",
    )  # fmt: skip
    assert code == 0
    facts = json.loads(printed)
    assert facts["adapters"] == [str(folder) for folder in pair]
    assert (facts["weights"], facts["rank"], facts["density"]) == ([1, 0.5], 3, 0.4)
    assert read_lora(out).rank == 3
    for arguments, message in (
        ([*pair, "--method", "svd"], "Missing option '--output'"),
        ([*pair, "--output", out, "--weights", "1;2"], '--weights must be numbers.*"1;2"'),
        ([*pair, "--output", out, "--method", "mean"], "method must be one of"),
        ([pair[0], "--output", out], "two adapters or more"),
    ):
        code, _, err = fedclip("merge", *arguments)
        assert code == 2
        assert "Traceback" not in err
        assert re.search(message, err), err


# --- weights searched on validation examples ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs on one base that saw different digits: each has its own validation examples."""
    place = tmp_path_factory.mktemp("runs")
    return [
        package.run(with_(**SEARCHED) | {"seed": seed}, output=place / str(seed)).folder
        for seed in (1, 2)
    ]


def test_a_search_finds_weights_that_are_no_worse(
    fedclip: Command, tmp_path: Path, runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_search, "_EVALUATIONS", 20)
    arguments = [*runs, "--search", runs[0], "--search", runs[1], "--weights", "0,1.5"]
    found = []
    for name in ("one", "again"):
        code, out, _ = fedclip("merge", *arguments, "--output", tmp_path / name, "--json")
        assert code == 0
        found.append(json.loads(out))
    one, again = found
    assert one == again | {"output": one["output"]}  # by seed
    for row in one["search"]:
        assert set(row) == {"validation", "before", "after"}
    *own, mean = one["search"]
    assert [row["validation"] for row in own] == [str(run) for run in runs]
    for side in ("before", "after"):
        assert mean[side] == pytest.approx(sum(row[side] for row in own) / 2)
    assert mean["after"] > mean["before"]  # 0 and 1.5 are no good weights
    assert all(0 <= weight <= 1.5 for weight in one["weights"])
    # The weights that are told are those that were used.
    merge(runs, tmp_path / "by hand", weights=one["weights"])
    name = "adapter_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "by hand" / name).read_bytes()


def test_what_a_search_judges_is_the_merged_model(tmp_path: Path, runs: list[Path]) -> None:
    """The accuracy of one adapter alone, weights 1 and 0, is what its run's evaluation says."""
    adapters = read_adapters(runs)
    merged, _ = combine(adapters, check_recipe(adapters, "cat", [1.0, 0.0]))
    for run in runs:
        (validation,) = Validation.of_run(run, adapters[0], Listener())
        accuracy, loss = validation.judge(merged)
        validation.judge(adapters[1])
        assert validation.judge(merged) == (accuracy, loss)
        if run == runs[0]:
            expected = evaluate(run)["validation_accuracy"]
            assert accuracy == pytest.approx(expected)


def test_searches_that_cannot_be_made(
    tmp_path: Path, runs: list[Path], pair: tuple[Path, Path]
) -> None:
    with pytest.raises(UsageError, match="is not a run folder"):
        merge(runs, tmp_path / "out", search=[pair[0]])
    random = [save(tmp_path / str(n), base="random:tiny") for n in (1, 2)]
    with pytest.raises(UsageError, match=r"was made on random:tiny, this model is tiny"):
        merge(random, tmp_path / "out", search=runs[:1])
    none = with_(data={"validation_fraction": 0}, federation={"rounds": 1}) | {"seed": 1}
    run = package.run(none | {"evaluation": {"keep_best": False}}, output=tmp_path / "run")
    with pytest.raises(UsageError, match="has no validation examples to search on"):
        merge(runs, tmp_path / "out", search=[run.folder])
    assert not (tmp_path / "out").exists()
