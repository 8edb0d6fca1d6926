"""What a user can get wrong, through the real command: message, exit code, and nothing lost."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedclip import files
from fedclip.errors import UsageError
from fedclip.experiment.folder import RunFolder
from fedclip.models.clip import create_clip_model
from tests.conftest import Command

SMALL = """
model: {model_name: "random:tiny", lora: {r: 2}}
client: {learning_rate: 0.01}
data: {name: imagefolder, path: PATH, templates: ["{}"]}
federation: {rounds: 2}
"""


def paint(path: Path, count: int = 8) -> None:
    """Some real images in a folder: noise, JPEG and PNG by turns."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(len(str(path.name)))
    for i in range(count):
        noise = rng.integers(0, 255, (24, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path / f"{i}.{'jpg' if i % 2 else 'png'}")


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    """Two sites with images of cats and dogs."""
    root = tmp_path / "images"
    for site in ("bonn", "oslo"):
        for kind in ("cat", "dog"):
            paint(root / site / kind)
    return root


@pytest.fixture
def config(tmp_path: Path, sites: Path) -> Path:
    """A configuration of a short run on them."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.replace("PATH", str(sites)))
    return path


def refused(answer: tuple[int, str, str], *words: str) -> None:
    """The command ended with 2, said all of this, and showed no traceback."""
    code, out, err = answer
    assert code == 2, err
    for word in words:
        assert word in err
    assert "Traceback" not in out + err


def test_all_configuration_errors_at_once(fedclip: Command, config: Path, tmp_path: Path) -> None:
    text = config.read_text().replace("r: 2", "r: 128, lora_dropout: 0.5, rang: 4")
    config.write_text(text.replace("rounds: 2", "rounds: many"))
    answer = fedclip("run", config, "--output", tmp_path / "run")
    refused(answer, "small.yaml", "model.lora.r", "64", "128", "model.lora.lora_dropout", "0.3")
    refused(answer, "model.lora.rang", "federation.rounds", "many")
    assert not (tmp_path / "run").exists()


def test_the_nearest_key_is_named(fedclip: Command, config: Path) -> None:
    refused(fedclip("run", config, "federation.num_client=3"), "num_client", "num_clients")


def test_two_learning_rates_that_differ(fedclip: Command, config: Path, tmp_path: Path) -> None:
    config.write_text(config.read_text() + "optimizer: {learning_rate: 0.02}\n")
    refused(fedclip("validate", config), "client.learning_rate", "optimizer.learning_rate")
    assert fedclip("validate", config, "--set", "client.learning_rate=0.5")[0] == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.model_name=./nowhere", ("model.model_name", "nowhere", "does not exist")),
        ("model.model_name=random:openai/clip-huge", ("clip-huge", "clip-vit-base-patch32")),
        ("data.path=/nowhere/at/all", ("data.path", "/nowhere/at/all")),
        ("data.class_names=[cat,dog,emu]", ("data.class_names", "3", "2")),
        ("federation.strategy=fedavgg", ("federation.strategy", "fedavg")),
        ("device=cuda:9", ("device", "cuda:9")),
        ("data.partition.name=natural2", ("data.partition.name",)),
    ],
)
def test_what_is_not_there(
    fedclip: Command, config: Path, tmp_path: Path, override: str, words: tuple[str, ...]
) -> None:
    refused(fedclip("run", config, override, "--output", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_a_hub_model_that_cannot_be_had(
    fedclip: Command, config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    answer = fedclip("run", config, "model.model_name=someone/some-clip")
    refused(answer, "model.model_name", "someone/some-clip", "tiny")


def test_an_empty_site(fedclip: Command, config: Path, tmp_path: Path, sites: Path) -> None:
    (sites / "ulm" / "cat").mkdir(parents=True)
    (sites / "ulm" / "cat" / "broken.png").write_bytes(b"no image")
    refused(fedclip("run", config, "--output", tmp_path / "run"), "ulm", "data.on_empty_site")
    assert not (tmp_path / "run").exists()
    arguments = ["data.on_empty_site=skip", "--output", tmp_path / "run"]
    code, _, err = fedclip("run", config, *arguments)
    assert code == 0
    assert "left out" in err
    assert "ulm" in err
    assert "broken.png" in err


def test_a_site_of_one_class_is_a_warning(
    fedclip: Command, config: Path, tmp_path: Path, sites: Path
) -> None:
    shutil.rmtree(sites / "oslo" / "dog")
    code, _, err = fedclip("run", config, "--output", tmp_path / "run")
    assert code == 0
    assert "oslo" in err
    assert "one class only: cat" in err


def test_an_output_that_holds_a_run(fedclip: Command, config: Path, tmp_path: Path) -> None:
    assert fedclip("run", config, "--output", tmp_path / "run")[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    answer = fedclip("run", config, "--output", tmp_path / "run")
    refused(answer, "already holds a run", "--resume")
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    # Resuming what is finished changes nothing either.
    assert fedclip("run", "--resume", tmp_path / "run")[0] == 0
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_a_diverging_run_names_the_client_and_ends_with_1(
    fedclip: Command, config: Path, tmp_path: Path
) -> None:
    options = ["client.learning_rate=1000", "data.batch_size=2", "--output", tmp_path / "run"]
    options += ["optimizer.name=sgd", "optimizer.max_grad_norm=null"]
    code, _, err = fedclip("run", config, *options)
    assert code == 1
    failed = re.search(r"client (bonn|oslo), round (\d+): ", err)
    assert failed, err
    assert "learning_rate" in err
    assert "Traceback" not in err
    checkpoint = RunFolder.open(tmp_path / "run").load_checkpoint()
    assert checkpoint is not None
    tensors, meta = checkpoint
    assert meta["server_round"] == int(failed[2]) - 1
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_full_disk_ends_with_1_and_loses_nothing(
    fedclip: Command, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_line = files.append_line

    def full(target: Path, line: bytes) -> None:
        if b'"server_round": 2' in line:
            raise OSError(28, "No space left on device")
        append_line(target, line)

    with monkeypatch.context() as patch:
        patch.setattr("fedclip.files.append_line", full)
        code, _, err = fedclip("run", config, "--output", tmp_path / "run")
    assert code == 1
    assert "No space left on device" in err
    assert "--resume" in err
    assert fedclip("run", "--resume", tmp_path / "run")[0] == 0
    assert fedclip("run", config, "--output", tmp_path / "undisturbed")[0] == 0
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        resumed, undisturbed = (tmp_path / run / name for run in ("run", "undisturbed"))
        assert resumed.read_bytes() == undisturbed.read_bytes()


def test_ctrl_c_keeps_the_last_round_and_ends_with_130(
    fedclip: Command, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(self: object, record: dict[str, int]) -> None:
        if record["server_round"] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedclip.reports.progress.PlainProgress.round", pressed)
        code, _, err = fedclip("run", config, "--output", tmp_path / "run")
    assert code == 130
    assert f"fedclip run --resume {tmp_path / 'run'}" in err
    assert fedclip("run", "--resume", tmp_path / "run")[0] == 0


# Whoever starts the tests in the background may have told them, and so their children, to ignore
# Ctrl-C; a terminal's programs do not.
AT_A_TERMINAL = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "[signal.signal(s, signal.SIG_DFL) for s in (signal.SIGTERM, signal.SIGHUP)]; "
    "runpy.run_module('fedclip', run_name='__main__', alter_sys=True)"
)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals to send")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_stops_a_real_process_which_can_go_on(
    fedclip: Command, config: Path, tmp_path: Path, name: str, code: int
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", AT_A_TERMINAL, "run"]
    arguments = [str(config), "federation.rounds=12", "--output", str(run)]
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        patience = time.monotonic() + 300
        while '"server_round": 1' not in _text_of(run / "metrics.jsonl"):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < patience
            time.sleep(0.02)
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert f"fedclip run --resume {run}" in err
    assert "Traceback" not in err
    assert not (run / "summary.json").exists()
    if name != "SIGTERM":  # going on is the same after all of them
        return
    code, _, err = fedclip("run", "--resume", run)
    assert code == 0, err
    assert len(RunFolder.open(run).read_metrics()) == 13


def _text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 4}, "rank"),
        ({"target_modules": {"vision_encoder": ["q_proj"]}}, "target"),
        ({"target_modules": {"text_encoder": ["q_proj"]}}, "target"),
    ],
)
def test_an_adapter_that_does_not_fit(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    config = {"model_name": "random:tiny", "lora": {"r": 2}}
    model = create_clip_model(config, class_names=["cat", "dog"])
    other = create_clip_model(
        {"model_name": "random:tiny", "lora": {"r": 2} | change}, class_names=["cat", "dog"]
    )
    before = model.get_parameters()
    other.save_adapter(tmp_path / "adapter")
    for attempt in (
        lambda: model.set_parameters(other.get_parameters()),
        lambda: model.load_adapter(tmp_path / "adapter"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            attempt()
        assert caught.value.exit_code == 2
    assert all((before[n] == t).all() for n, t in model.get_parameters().items())


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    create_clip_model({"model_name": "random:tiny"}, class_names=["a"], seed=1).save_adapter(
        tmp_path / "adapter"
    )
    model = create_clip_model({"model_name": "random:tiny"}, class_names=["a"], seed=2)
    with pytest.raises(UsageError, match="other weights"):
        model.load_adapter(tmp_path / "adapter")
