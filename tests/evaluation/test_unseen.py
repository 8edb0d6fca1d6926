"""What becomes of classes that were not trained: other data sets, and new classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedclip.config.loading import config_from_dict
from fedclip.data.base_classes import with_base_classes
from fedclip.data.datasets import load_source
from fedclip.data.federated_data import FederatedData
from fedclip.data.splits import ClientData
from fedclip.errors import FedclipWarning, UsageError
from fedclip.evaluation.predictions import How
from fedclip.evaluation.unseen import (
    Unseen,
    base_to_new,
    before_and_after,
    harmonic_mean,
    other_data,
)
from fedclip.experiment import run as experiment
from fedclip.experiment.build import build
from fedclip.models.clip import CLIPLoRAWrapper, create_clip_model
from fedclip.reports.listener import Listener

HOW = How(torch.device("cpu"), "fp32", 256)
DIGITS = {"class_names": ["zero", "one", "two"], "templates": ["a {}"], "seed": 0}


def clip(**lora: Any) -> CLIPLoRAWrapper:
    targets = {"vision_encoder": ["q_proj"], "text_encoder": ["q_proj"]}
    settings = {"r": 2, "lora_alpha": 2, "target_modules": targets} | lora
    return create_clip_model({"model_name": "tiny", "lora": settings}, **DIGITS)


def indices(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def federation() -> FederatedData:
    """Eight images of the classes a, b, c, d, two of each: 0 0 1 1 2 2 3 3."""
    none = indices()
    return FederatedData(
        name="eight",
        pixels=np.zeros((8, 3, 2, 2), np.uint8),
        labels=np.repeat(np.arange(4), 2),
        class_names=("a", "b", "c", "d"),
        templates=("a {}",),
        clients=(
            ClientData("one", indices(0, 2, 4), indices(6), none),
            ClientData("two", indices(4, 6), none, none),
        ),
        validation=indices(0, 6),
        test=indices(1, 3, 5, 7),
        bad_images=(),
        fingerprint="",
        partition={},
    )


def test_base_classes_by_hand() -> None:
    with pytest.warns(FedclipWarning, match="left out: two"):
        data = with_base_classes(federation(), 0.5)
    assert data.class_names == ("a", "b")
    assert [c.client_id for c in data.clients] == ["one"]
    assert data.clients[0].train.tolist() == [0, 2]
    assert data.clients[0].validation.tolist() == []
    assert data.validation.tolist() == [0]
    assert data.test.tolist() == [1, 3]
    assert data.labels[data.test].tolist() == [0, 1]
    new = data.new_classes
    assert new is not None
    assert new.class_names == ("c", "d")
    assert new.test.tolist() == [5, 7]
    assert new.labels[new.test].tolist() == [0, 1]
    assert data.counts(data.clients[0].train) == [1, 1]


def test_base_classes_by_name_keep_the_order_of_the_data_set() -> None:
    data = with_base_classes(federation(), ["d", "b", "c"])
    assert data.class_names == ("b", "c", "d")
    assert data.labels[data.test].tolist() == [0, 1, 2]
    assert data.new_classes is not None
    assert data.new_classes.class_names == ("a",)


@pytest.mark.parametrize(("share", "count"), [(0.5, 2), (0.51, 3), (0.01, 1), (0.75, 3)])
@pytest.mark.filterwarnings("ignore:clients without")
def test_a_share_is_rounded_up(share: float, count: int) -> None:
    assert len(with_base_classes(federation(), share).class_names) == count


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (["a", "x"], "x is no class of the data set"),
        (["a", "b", "c", "d"], "leaves no new class of the 4"),
        (0.99, "leaves no new class of the 4"),
    ],
)
def test_what_train_classes_refuses(chosen: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        with_base_classes(federation(), chosen)


def test_keys_that_do_not_fit() -> None:
    for values, said in (
        ({"data": {"train_classes": 0.5}, "model": {"head": "linear"}}, "data.train_classes needs"),
        ({"evaluation": {"other_data": ["digits"]}}, "digits is what is trained on"),
        ({"evaluation": {"other_data": ["mnist"]}}, r"other_data\[0\] must be one of digits"),
        ({"data": {"train_classes": 1.5}}, "must be a share between 0 and 1, a list"),
    ):
        with pytest.raises(UsageError, match=said):
            config_from_dict(values)


def test_harmonic_mean_by_hand() -> None:
    assert harmonic_mean(0.9, 0.6) == pytest.approx(0.72)
    assert harmonic_mean(0.0, 0.0) == 0.0


def unseen(model: CLIPLoRAWrapper) -> Unseen:
    return other_data("icons", model, 120, seed=0)


def test_the_draw_of_other_images_is_capped_and_seeded() -> None:
    model = clip()
    first, again, other = (other_data("icons", model, 50, seed) for seed in (0, 0, 1))
    assert len(first.labels) == 50
    assert np.array_equal(first.pixels, again.pixels)
    assert not np.array_equal(first.pixels, other.pixels)
    source = load_source("icons")
    assert first.class_names == source.class_names


def test_an_untrained_adapter_forgets_nothing() -> None:
    model = clip()
    before, after = before_and_after(model, {}, unseen(model), HOW)
    assert before == after
    assert before > 0.4  # it was pretrained on icons, by other hands


def test_a_spoilt_model_forgets_and_is_given_back_as_it_was() -> None:
    plain = before_and_after(clip(), {}, unseen(clip()), HOW)[0]
    model = clip()
    images = unseen(model)
    layer = next(iter(model.trainable())).partition(".lora_")[0].removeprefix("base_model.model.")
    weight = dict(model.clip.named_modules())[layer].get_base_layer().weight
    shift = {layer: torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))}
    model.set_parameters({n: torch.ones_like(t) for n, t in model.get_parameters().items()})
    model.set_shift(shift)
    logits = model(torch.from_numpy(images.pixels[:4]))
    before, after = before_and_after(model, shift, images, HOW)
    assert before == plain  # neither the adapter nor the shift counts
    assert after < before - 0.1
    assert model.class_names == ("zero", "one", "two")
    assert torch.equal(model(torch.from_numpy(images.pixels[:4])), logits)


def test_a_run_on_half_of_the_classes(tmp_path: Any) -> None:
    config = config_from_dict(
        {
            "model": {"model_name": "tiny", "lora": {"r": 2, "lora_alpha": 2}},
            "data": {
                "name": "digits",
                "max_train_examples": 150,
                "train_classes": 0.5,
                "partition": {"name": "iid"},
            },
            "client": {"learning_rate": 0.02},
            "federation": {"rounds": 1, "num_clients": 2},
            "evaluation": {"other_data": ["icons"], "max_examples": 60},
        }
    )
    run = experiment.run(config, output=tmp_path / "run")
    summary = run.summary
    assert summary["base_accuracy"] == summary["accuracy"]
    assert summary["base_zero_shot_accuracy"] == summary["zero_shot_accuracy"]
    assert summary["harmonic_mean"] == pytest.approx(
        harmonic_mean(summary["base_accuracy"], summary["new_accuracy"])
    )
    assert set(summary["forgetting"]) == {"icons"}
    # The figures on new classes, by another way: the base model and the adapter, used by hand.
    data = load_source("digits")
    names = [str(name) for name in data.class_names]
    model = create_clip_model(config.model, class_names=names[:5], templates=data.templates, seed=0)
    assert model.class_names == tuple(names[:5])
    federated = build(config, Listener()).data
    new = federated.new_classes
    assert new is not None
    assert new.class_names == tuple(names[5:])
    model.load_adapter(run.adapter)
    model.set_classes(names[5:], data.templates)
    pixels = torch.from_numpy(federated.pixels[new.test])
    with torch.no_grad():
        trained = model(pixels).argmax(dim=-1).numpy()
        with model.zero_shot():
            untrained = model(pixels).argmax(dim=-1).numpy()
    labels = new.labels[new.test]
    assert summary["new_accuracy"] == pytest.approx((trained == labels).mean())
    assert summary["new_zero_shot_accuracy"] == pytest.approx((untrained == labels).mean())


def test_base_to_new_needs_no_more_than_the_model() -> None:
    model = clip()
    with pytest.warns(FedclipWarning):
        data = with_base_classes(federation(), 0.5)
    size = model.image_size
    pixels = np.zeros((8, 3, size, size), np.uint8)
    data = FederatedData(**{**vars(data), "pixels": pixels})
    found = base_to_new(model, {}, data, base=(0.5, 0.8), how=HOW)
    # Two equal images of two classes: one of them is right.
    assert found["new_accuracy"] == found["new_zero_shot_accuracy"] == 0.5
    assert found["harmonic_mean"] == pytest.approx(2 * 0.8 * 0.5 / 1.3)
