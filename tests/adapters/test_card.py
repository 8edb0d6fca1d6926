"""`fedclip card` and `fedclip push`; the hub is a stub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import httpx
import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from fedclip.adapters.card import run_card
from fedclip.models.adapter_card import loading
from fedclip.models.trainable.lora import Lora
from fedclip.reports.share import wilson
from tests.conftest import Command


def changed(run: Path, to: Path, model: str, data: tuple[str, str | None]) -> Path:
    """A copy of a run that says it used another model and other data."""
    shutil.copytree(run, to)
    config = yaml.safe_load((to / "config.yaml").read_text())
    config["model"]["model_name"] = model
    config["data"]["name"], config["data"]["path"] = data
    (to / "config.yaml").write_text(yaml.safe_dump(config))
    return to


def test_a_card_says_how_to_classify_images(finished_run: Path) -> None:
    told = "`fedclip predict <this folder> IMAGE...`"
    for card in (run_card(finished_run), (finished_run / "adapter/README.md").read_text()):
        assert card.count(told) == 1
    assert told not in "\n".join(loading(Lora, "tiny", head=None))  # captions name no classes
    assert told in "\n".join(loading(Lora, "tiny", head="linear"))


def test_a_card_says_how_sure_its_accuracy_is(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    low, high = wilson(summary["accuracy"], summary["test_examples"])
    assert f"by the number of test images | {low:.3f} to {high:.3f} |" in run_card(finished_run)


def test_the_hub_reads_the_card(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    card = ModelCard(run_card(finished_run, "me/my-adapter"))
    data = card.data
    assert data.library_name == "peft"
    assert {"clip", "lora", "federated-learning"} <= set(data.tags)
    assert data.model_name == "my-adapter"
    first, lowest = data.eval_results
    assert (first.dataset_type, first.metric_type) == ("digits", "accuracy")
    assert first.metric_value == summary["accuracy"]
    assert lowest.metric_value == summary["client_accuracy"]["min"]
    assert data.base_model is None  # random weights are nowhere on the hub
    for words in (
        f"| before training (zero-shot) | {summary['zero_shot_accuracy']:.3f} |",
        f"| lowest client | {summary['client_accuracy']['min']:.3f} |",
        "Strategy `fedavg`, 1 rounds, 2 of 3 clients",
        "divided by `dirichlet`",
        'PeftModel.from_pretrained(clip, "me/my-adapter")',
        "## Limits",
    ):
        assert words in card.text, words


def test_traffic_is_that_of_all_rounds_and_clients(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    both = summary["bytes_up_per_client_round"] + summary["bytes_down_per_client_round"]
    assert f"all of them together {both * 1 * 2 / 1e6:.1f} MB" in run_card(finished_run)


edited = pytest.mark.filterwarnings("ignore:.*has changed since the run ended")


@edited
def test_models_and_data_of_the_hub_are_linked(finished_run: Path, tmp_path: Path) -> None:
    model = "openai/clip-vit-base-patch32"
    run = changed(finished_run, tmp_path / "run", model, ("hub", "uoft-cs/cifar10"))
    data = ModelCard(run_card(run)).data
    assert data.base_model == model
    assert data.datasets == ["uoft-cs/cifar10"]


@edited
def test_the_card_tells_no_folders_and_no_clients(finished_run: Path, tmp_path: Path) -> None:
    run = changed(finished_run, tmp_path / "run", "/secret/my-clip", ("hub", "/secret/images"))
    text = run_card(run)
    assert "/secret" not in text
    assert "my-clip" in text
    partition = json.loads((run / "partition.json").read_text())
    assert not any(client["client_id"] in text for client in partition["clients"])


def test_the_command_prints_or_writes(fedclip: Command, finished_run: Path, tmp_path: Path) -> None:
    code, out, _ = fedclip("card", finished_run)
    assert (code, out) == (0, run_card(finished_run))
    assert fedclip("card", finished_run, "--output", tmp_path / "card.md")[:2] == (0, "")
    assert (tmp_path / "card.md").read_text() == out
    code, _, err = fedclip("card", finished_run, "--output", tmp_path / "none" / "card.md")
    assert code == 2
    assert "--output" in err


class Hub:
    """Stands in for HfApi: keeps what is uploaded."""

    repos: ClassVar[dict[str, bool]] = {}
    files: ClassVar[dict[str, bytes]] = {}
    failure: ClassVar[BaseException | None] = None

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        if self.failure:
            raise self.failure
        self.repos[repo_id] = private
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.files.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    fresh = type("FreshHub", (Hub,), {"repos": {}, "files": {}})
    monkeypatch.setattr(huggingface_hub, "HfApi", fresh)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_none")
    return fresh


def test_push_uploads_adapter_and_card(
    fedclip: Command, finished_run: Path, hub: type[Hub]
) -> None:
    code, out, _ = fedclip("push", finished_run, "me/mine", "--private")
    assert (code, out) == (0, "https://huggingface.co/me/mine\n")
    assert hub.repos == {"me/mine": True}
    adapter = finished_run / "adapter"
    assert set(hub.files) == {path.name for path in adapter.iterdir()}
    weights = "adapter_model.safetensors"
    assert hub.files[weights] == (adapter / weights).read_bytes()
    assert hub.files["README.md"].decode() == run_card(finished_run, "me/mine")
    assert fedclip("push", finished_run, "me/mine")[0] == 0
    assert hub.repos == {"me/mine": False}


def test_push_warns_of_a_base_model_that_only_this_machine_has(
    fedclip: Command, finished_run: Path, hub: type[Hub], tmp_path: Path
) -> None:
    run = changed(finished_run, tmp_path / "run", "/secret/my-clip", ("digits", None))
    code, _, err = fedclip("push", run, "me/mine")
    assert code == 0
    assert "base model by the folder /secret/my-clip" in err


def refused() -> HfHubHTTPError:
    response = httpx.Response(403, request=httpx.Request("POST", "https://huggingface.co"))
    return HfHubHTTPError("403 Forbidden", response=response)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (httpx.ConnectError("no route"), "the hub cannot be reached (no route)"),
        (OfflineModeIsEnabled("offline"), "without HF_HUB_OFFLINE"),
        (refused(), "the hub refused me/mine: 403 Forbidden"),
    ],
)
def test_what_the_hub_says_is_passed_on(
    fedclip: Command, finished_run: Path, hub: type[Hub], failure: BaseException, words: str
) -> None:
    hub.failure = failure
    code, out, err = fedclip("push", finished_run, "me/mine")
    assert (code, out) == (2, "")
    assert words in err


def test_nobody_logged_in_and_bad_names(
    fedclip: Command, finished_run: Path, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = fedclip("push", finished_run, "a/b/c")
    assert code == 2
    assert "a/b/c is no name of a repository" in err
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    code, _, err = fedclip("push", finished_run, "me/mine")
    assert code == 2
    assert "hf auth login" in err
    assert hub.repos == {}
