"""Runs with hostile clients: what they leave behind, and what they do not go with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedclip.adapters.card import run_card
from fedclip.config.loading import config_from_dict
from fedclip.deploy.coordinator.coordinate import coordinate
from fedclip.deploy.job import job_config, make_job
from fedclip.errors import UsageError
from fedclip.experiment.audit.canaries import example_audit
from fedclip.experiment.build import build
from fedclip.experiment.folder import RunFolder
from fedclip.experiment.forecast import forecast
from fedclip.experiment.hostile import StampedPixels
from fedclip.experiment.run import Run, resume, run
from fedclip.lora.attacks import ATTACKS
from fedclip.models.adapter_folder import read_adapter
from fedclip.reports.listener import Listener
from tests.support.runs import StopAfter
from tests.support.small import SMALL

CONFIG: dict[str, Any] = {
    "model": {"model_name": SMALL, "lora": {"r": 2, "last_layers": 1}},
    "client": {"learning_rate": 0.01},
    "data": {"name": "digits", "max_train_examples": 90},
    "federation": {"rounds": 2, "num_clients": 5, "strategy": "ffa"},
    "evaluation": {"max_examples": 20},
    "device": "cpu",
}


def with_(name: str = "sign_flip", clients: Any = 2, **sections: Any) -> dict[str, Any]:
    values = {**CONFIG, "attack": {"name": name, "clients": clients}}
    for section, keys in sections.items():
        old = values.get(section)
        values[section] = {**old, **keys} if isinstance(old, dict) else keys
    return values


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without hostile clients."""
    return run(with_("none"), output=tmp_path_factory.mktemp("clean") / "run")


@pytest.mark.parametrize("name", ["gaussian", "backdoor"])
def test_a_resumed_run_is_an_uninterrupted_one_on_either_engine(
    name: str, tmp_path: Path, clean: Run
) -> None:
    done = run(with_(name), output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(with_(name), output=tmp_path / "run", listener=StopAfter(1))
    again = resume(tmp_path / "run")
    for file in ("metrics.jsonl", "checkpoint.safetensors"):
        assert (done.folder / file).read_bytes() == (again.folder / file).read_bytes()
    other = run(with_(name, engine={"name": "sequential"}), output=tmp_path / "sequential")
    ours, theirs, honest = (
        torch.cat([t.flatten() for n, t in sorted(read_adapter(d.adapter)[0].items())])
        for d in (done, other, clean)
    )
    assert (ours - theirs).norm() < 1e-3 * (ours - honest).norm()
    attack = done.summary["attack"]
    assert (attack["name"], attack["strength"]) == (name, ATTACKS[name].strength)
    assert len(attack["clients"]) == 2
    assert "attack" not in clean.summary


def test_the_card_and_the_terminal_say_that_clients_were_hostile(tmp_path: Path) -> None:
    class Heard(Listener):
        def __init__(self) -> None:
            self.said: list[str] = []

        def message(self, text: str) -> None:
            self.said.append(text)

    heard = Heard()
    done = run(with_(federation={"rounds": 1}), output=tmp_path / "run", listener=heard)
    who = ", ".join(done.summary["attack"]["clients"])
    assert f"an experiment with hostile clients: sign_flip 5 by {who}" in heard.said
    card = run_card(done.folder)
    assert "2 of its clients were hostile on purpose (`sign_flip`, strength 5)" in card
    assert "client-0" not in card
    assert "2 hostile clients (sign_flip)" in (done.folder / "report.html").read_text()


def test_a_forecast_measures_the_run_without_its_attack() -> None:
    """Claimed examples are not trained on, and hostile clients are as slow as others."""
    context = build(config_from_dict(with_("inflation")), Listener())
    assert max(context.clients.values()) > 90
    assert forecast(context).rounds_seconds > 0


def test_a_backdoor_is_measured_on_test_images_of_other_classes(tmp_path: Path) -> None:
    """The patch alone decides: a model that always says the target has a success of 1."""
    sections: dict[str, Any] = {"federation": {"rounds": 1}, "evaluation": {"max_examples": None}}
    done = run(with_("backdoor", 0, **sections), output=tmp_path / "run")
    lines = RunFolder(done.folder).read_metrics()
    assert all(0 <= line["backdoor_success"] <= 1 for line in lines)
    assert done.summary["backdoor_success"] == lines[-1]["backdoor_success"]
    context = build(config_from_dict(with_("backdoor", 2)), Listener())
    stamped, plain = context.as_trained().data, context.data
    changed = np.flatnonzero(stamped.labels != plain.labels)
    hostile = np.concatenate([context.training[c] for c in sorted(context.hostile)])
    assert set(changed) <= set(hostile)
    assert (stamped.labels[changed] == 0).all()
    shown = np.flatnonzero((stamped.pixels[:] != plain.pixels[:]).any(axis=(1, 2, 3)))
    assert set(plain.test) <= set(shown)
    assert set(shown) - set(plain.test) <= set(hostile)
    assert len(set(shown) - set(plain.test)) == sum(
        max(1, round(0.5 * len(context.training[c]))) for c in context.hostile
    )


def test_flipped_labels_are_those_of_hostile_clients_alone() -> None:
    context = build(config_from_dict(with_("label_flip")), Listener())
    poisoned, plain = context.as_trained().data.labels, context.data.labels
    for client, rows in context.training.items():
        flipped = poisoned[rows] == 9 - plain[rows]
        assert (flipped if client in context.hostile else poisoned[rows] == plain[rows]).all()
    assert (poisoned[context.data.test] == plain[context.data.test]).all()


def test_stamped_pixels_are_read_like_an_array() -> None:
    plain = np.arange(4 * 3 * 8 * 8, dtype=np.uint8).reshape(4, 3, 8, 8)
    kept, stamped = plain.copy(), StampedPixels(plain, np.array([1, 3]))
    expected = plain.copy()
    expected[[1, 3], :, 6:, 6:] = 255
    for where in (1, 2, slice(1, None), slice(0), np.array([3, 0, 3]), np.array([], dtype=int)):
        assert (stamped[where] == expected[where]).all()
        assert stamped[where].shape == expected[where].shape
    assert len(stamped) == 4
    assert (plain == kept).all()


@pytest.mark.parametrize(
    ("attack", "sections", "text"),
    [
        ({"name": "sign_flop", "clients": 1}, {}, "did you mean sign_flip"),
        ({"name": "sign_flip"}, {}, "attack.clients must say how many"),
        ({"name": "sign_flip", "clients": 5}, {}, "5 hostile clients leave none that is honest"),
        ({"name": "sign_flip", "clients": -1}, {}, "attack.clients must be"),
        ({"name": "sign_flip", "clients": True}, {}, "attack.clients must be"),
        ({"name": "alie", "clients": 1, "strength": 0}, {}, "attack.strength must be"),
        ({"name": "alie", "clients": 1, "strength": 1e9}, {}, "attack.strength must be"),
        ({"name": "backdoor", "clients": 1, "strength": 1.5}, {}, "share .*: 1 at most, got 1.5"),
        ({"name": "min_max", "clients": 1, "strength": 2}, {}, "min_max has none; leave it out"),
        ({"strength": 2.0}, {}, "attack.name: none has none"),
        *(
            ({"name": "ipm", "clients": 1}, sections, f"{key} does not go with attack.name: ipm")
            for key, sections in {
                "federation.strategy": {"federation": {"strategy": "local"}},
                "privacy.unit": {
                    "privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}
                },
                "secure.aggregation": {"secure": {"aggregation": "masked"}},
                "federation.client_ranks": {
                    "federation": {"strategy": "flexlora", "client_ranks": [2, 1, 1, 1, 1]}
                },
                "federation.dynamic_ranks.enabled": {
                    "federation": {"strategy": "fedavg", "dynamic_ranks": {"enabled": True}}
                },
                "federation.sharing.mode": {
                    "federation": {"sharing": {"mode": "clusters", "cluster_round": 1}}
                },
            }.items()
        ),
        ({"name": "backdoor", "clients": 1}, {"federation": {"ditto_mu": 0.1}}, "ditto_mu does"),
        ({"name": "backdoor", "clients": 1}, {"federation": {"strategy": "fedsa"}}, "fedsa|shared"),
        ({"name": "label_flip", "clients": 1}, {"task": "contrastive"}, "task does not go with"),
    ],
)
def test_what_does_not_go_with_hostile_clients_is_refused(
    attack: dict[str, Any], sections: dict[str, Any], text: str
) -> None:
    values = with_(**sections) | {"attack": attack}
    with pytest.raises(UsageError, match=text):
        config_from_dict(values)


def test_nobody_is_hostile_over_machines_or_in_an_audit(tmp_path: Path) -> None:
    config = config_from_dict(with_())
    with pytest.raises(UsageError, match=r"attack.name: sign_flip .*leave `attack` out"):
        coordinate(config, tmp_path / "run", print)
    assert not (tmp_path / "run").exists()
    job = make_job(config_from_dict(CONFIG), ["a"], ["{}"])
    job["config"]["attack"] = {"name": "label_flip", "clients": 1}
    with pytest.raises(UsageError, match="a site trains with none"):
        job_config(job, "cpu", config.data)
    with pytest.raises(UsageError, match=r"attack.name: an audit"):
        example_audit(config, 20)
