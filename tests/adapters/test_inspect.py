"""Finished runs of every kind: they open again, and answer what is asked of them."""

import shutil

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

import fedclip
from fedclip.adapters import inspect as inspection
from fedclip.errors import FedclipWarning, UsageError
from fedclip.experiment import run as experiment
from tests.support.runs import CONFIG, StopAfter, with_


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing disturbed."""
    return fedclip.run(CONFIG, output=tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("full", {"model": {"lora": {"enabled": False}}}),
        ("linear", {"model": {"head": "linear"}}),
        ("both towers", {"model": {"lora": {"target_modules": {"text_encoder": ["q_proj"]}}}}),
        ("accumulation", {"data": {"batch_size": 8, "accumulation_steps": 4}}),
        ("checkpointing", {"model": {"gradient_checkpointing": True}}),
        ("bf16", {}),
    ],
)
def test_every_kind_of_run_ends_with_an_adapter_that_opens_again(tmp_path, name, change):
    config = with_(**change) | ({"precision": "bf16"} if name == "bf16" else {})
    config["federation"] = CONFIG["federation"] | {"rounds": 1}
    run = fedclip.run(config, output=tmp_path / "run")
    assert run.summary["rounds"] == 1
    figures = inspection.evaluate(run.folder)
    assert figures["accuracy"] == run.summary["accuracy"]
    model = inspection.load_run_model(run.folder)
    assert (
        fedclip.models.clip.adapter_sha256(model.get_parameters())
        == (run.summary["adapter_sha256"])
    )
    assert (run.adapter / "head.safetensors").exists() == (name == "linear")


def test_checkpointing_and_accumulation_change_no_result(tmp_path, undisturbed):
    """Dropout included: recomputation must draw the mask of the first pass."""
    run = fedclip.run(with_(model={"gradient_checkpointing": True}), output=tmp_path / "run")
    ours = load_file(run.adapter / "adapter_model.safetensors")
    theirs = load_file(undisturbed.adapter / "adapter_model.safetensors")
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-5 * tensor.norm()


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("evaluation", "max_examples", 7),
        ("federation", "ditto_mu", 0.1),
        ("federation", "strategy", "fedsa"),
        ("data", "templates", ["a {}"]),
        ("client", "learning_rate", 0.5),
    ],
)
def test_an_edited_configuration_is_not_evaluated(tmp_path, undisturbed, section, key, value):
    """The figures would be another run's; where it is computed may differ, which is said."""
    folder = shutil.copytree(undisturbed.folder, tmp_path / "run")
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    tree[section][key] = value
    if key == "learning_rate":
        tree["optimizer"][key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(
        UsageError, match=rf"{section}\.{key} was .*, now .*put the old values back"
    ):
        inspection.evaluate(folder)


def test_a_run_is_evaluated_where_it_is_put(tmp_path, undisturbed):
    folder = shutil.copytree(undisturbed.folder, tmp_path / "run")
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    tree["engine"]["group_size"] = 1
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.warns(FedclipWarning, match="has changed since the run ended"):
        figures = inspection.evaluate(folder)
    assert figures["accuracy"] == undisturbed.summary["accuracy"]


def test_info_counts_without_training(undisturbed):
    facts = inspection.info(undisturbed.folder)
    assert facts["trainable_parameters"] == undisturbed.summary["trainable_parameters"]
    assert facts["times_less_traffic"] == pytest.approx(
        facts["base_parameters"] / facts["trainable_parameters"]
    )
    assert facts["summary"] == undisturbed.summary


def test_predictions_are_probabilities_and_take_other_labels(undisturbed, tmp_path):
    Image.new("L", (40, 30), 200).save(tmp_path / "grey.png")
    (found,) = inspection.predict(undisturbed.folder, [tmp_path / "grey.png"])
    assert found["label"] in (
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
    )
    assert sum(found["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert found["confidence"] == max(found["scores"].values())
    (other,) = inspection.predict(undisturbed.folder, [tmp_path / "grey.png"], ["cat", "dog"])
    assert set(other["scores"]) == {"cat", "dog"}


def test_predict_names_the_file_that_it_cannot_read(undisturbed, tmp_path):
    (tmp_path / "note.png").write_text("not an image")
    with pytest.raises(UsageError, match=r"note\.png: not an image"):
        inspection.predict(undisturbed.folder, [tmp_path / "note.png"])
    with pytest.raises(UsageError, match=r"gone\.png: there is no such"):
        inspection.predict(undisturbed.folder, [tmp_path / "gone.png"])


def test_an_unfinished_run_cannot_be_evaluated(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        experiment.run(CONFIG, output=tmp_path / "run", listener=StopAfter(0))
    with pytest.raises(UsageError, match=r"not finished.*--resume"):
        inspection.evaluate(tmp_path / "run")
