"""What is asked of a finished coordinator's run: info, evaluate, card, and using its adapter."""

import shutil
from pathlib import Path

import pytest

from fedclip.adapters.card import run_card
from fedclip.adapters.inspect import evaluate, info
from fedclip.adapters.predict import predict
from fedclip.config.loading import config_from_dict
from fedclip.errors import UsageError
from fedclip.experiment.run import Run, resume
from tests.support.machines import NAMES, FakeMail, coordinate_here, trainer, tree, write_images


def coordinated(root: Path, **sections) -> Run:
    images = write_images(root / "images")
    config = config_from_dict(tree(images, evaluation={"max_examples": None}, **sections))
    sites = {name: trainer(images, root / "state", name).answer for name in NAMES}
    return coordinate_here(config, root / "run", FakeMail(sites))[0]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return coordinated(tmp_path_factory.mktemp("shared"))


def test_evaluate_gives_the_runs_own_figures(shared: Run) -> None:
    figures = evaluate(shared.folder)
    for key in ("accuracy", "zero_shot_accuracy"):
        assert figures[key] == shared.summary[key], key
    assert figures["test_examples"] == 20
    assert evaluate(shared.folder, detail=True)["detail"]


def test_info_counts(shared: Run) -> None:
    facts = info(shared.folder)
    assert facts["summary"] == shared.summary
    assert facts["bytes_up_per_client_round"] == shared.summary["bytes_up_per_client_round"]


def test_the_card_says_that_images_stayed_at_their_sites(shared: Run) -> None:
    card = run_card(shared.folder)
    assert "- Images of 3 sites, which stayed there." in card
    assert "- 20 test examples of the coordinator's." in card
    assert f"| trained | {shared.summary['accuracy']:.3f} |" in card
    assert "they exchanged parameters, never images" in card
    assert not any(name in card for name in ("north", "south"))


def test_it_is_not_gone_on_with_as_a_simulation(shared: Run, tmp_path: Path) -> None:
    begun = Path(shutil.copytree(shared.folder, tmp_path / "begun"))
    (begun / "summary.json").unlink()
    for lost in (None, "checkpoint.safetensors", "checkpoint_previous.safetensors"):
        (begun / (lost or "none")).unlink(missing_ok=True)
        with pytest.raises(UsageError, match=r"is a coordinator's run, .*fedclip coordinate"):
            resume(begun)


@pytest.mark.parametrize("text", ["[", '{"north": "x"}', '{"north": -1}', '{"north": 1.5}', "3"])
def test_a_damaged_list_of_sites_is_named(shared: Run, tmp_path: Path, text: str) -> None:
    copied = Path(shutil.copytree(shared.folder, tmp_path / "copied"))
    (copied / "deploy" / "sites.json").write_text(text)
    with pytest.raises(UsageError, match=r"sites\.json is damaged"):
        evaluate(copied)


def test_its_adapter_predicts(shared: Run) -> None:
    (image, *_) = sorted((shared.folder.parent / "images" / "test").rglob("*.png"))
    (found,) = predict(shared.folder, [image])
    assert found["label"].startswith("digit")


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"federation": {"strategy": "fedsa"}}, "every site has a model of its own"),
        (
            {
                "deploy": {"test_data": False},
                "data": {"name": "digits", "class_names": [f"digit_{i}" for i in range(5)]},
            },
            "deploy.test_data is false",
        ),
    ],
    ids=["personal", "without tests"],
)
def test_what_cannot_be_evaluated_says_why(tmp_path: Path, sections, why: str) -> None:
    if "data" in sections:
        sections["data"] |= {"path": None, "layout": "auto"}
    run = coordinated(tmp_path, **sections)
    with pytest.raises(UsageError, match=rf"coordinator's run, .*{why}.*accuracy_by_client"):
        evaluate(run.folder)
    assert "Images of 3 sites" in run_card(run.folder)
    assert info(run.folder)["summary"] == run.summary
