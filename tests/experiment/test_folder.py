"""The run folder: whole files, torn lines, locks, full disks."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedclip import files
from fedclip.errors import DamagedFile, FedclipError, UsageError
from fedclip.experiment.checkpoint import Checkpoint
from fedclip.experiment.folder import METRICS, TIMING, RunFolder, next_folder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", "seed: 1\n")


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_new_folder_appears_with_its_configuration(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "deep" / "run", "seed: 1\n")
    assert (folder.path / "config.yaml").read_text() == "seed: 1\n"
    assert names(tmp_path / "deep") == ["run"]
    assert not folder.is_finished()


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert RunFolder.create(tmp_path / "run", "seed: 1\n").is_run()


def test_a_folder_that_holds_a_run_is_left_alone(folder: RunFolder) -> None:
    with pytest.raises(UsageError, match=r"already holds a run.*--resume"):
        RunFolder.create(folder.path, "seed: 2\n")
    assert (folder.path / "config.yaml").read_text() == "seed: 1\n"


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="not empty and holds no run"):
        RunFolder.create(tmp_path, "seed: 2\n")
    with pytest.raises(UsageError, match="is a file"):
        RunFolder.create(tmp_path / "thesis.tex", "seed: 2\n")
    assert names(tmp_path) == ["thesis.tex"]


def test_opening_names_what_is_missing(tmp_path: Path, folder: RunFolder) -> None:
    assert RunFolder.open(folder.path).path == folder.path
    with pytest.raises(UsageError, match=r"has no config\.yaml"):
        RunFolder.open(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        RunFolder.open(tmp_path / "nowhere")


def test_json_keeps_text_and_turns_nan_into_null(folder: RunFolder) -> None:
    folder.write_json("partition.json", {"classes": ("猫", "b"), "loss": float("nan"), 3: [1.5]})
    assert folder.read_json("partition.json") == {"classes": ["猫", "b"], "loss": None, "3": [1.5]}
    with pytest.raises(UsageError, match=r"has no summary\.json"):
        folder.read_json("summary.json")
    (folder.path / "summary.json").write_text("{")
    with pytest.raises(UsageError, match=r"summary\.json is damaged"):
        folder.read_json("summary.json")


def test_lines_after_the_checkpoint_and_a_torn_one_are_dropped(folder: RunFolder) -> None:
    for server_round in range(4):
        folder.append_metrics({"server_round": server_round, "accuracy": 0.1 * server_round})
        folder.append_timing({"server_round": server_round, "seconds": 1.0})
    whole = (folder.path / METRICS).read_bytes()
    with (folder.path / METRICS).open("ab") as file:
        file.write(b'{"server_round": 4, "accu')
    assert len(folder.read_metrics()) == 4
    folder.truncate_metrics(3)
    assert (folder.path / METRICS).read_bytes() == whole
    folder.truncate_metrics(1)
    assert [r["server_round"] for r in folder.read_metrics()] == [0, 1]
    assert [r["server_round"] for r in folder.read_timing()] == [0, 1]
    assert (folder.path / METRICS).read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
    folder.truncate_metrics(-1)
    assert (folder.path / TIMING).read_bytes() == b""


def test_a_damaged_line_is_named(folder: RunFolder) -> None:
    (folder.path / METRICS).write_text('{"server_round": 0}\noops\n')
    with pytest.raises(UsageError, match=r"metrics\.jsonl, line 2 is damaged"):
        folder.read_metrics()


def test_checkpoint_round_trip(folder: RunFolder) -> None:
    assert folder.load_checkpoint() is None
    base = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    tensors = {"a": base, "view": base[0], "t": base.t(), "n": torch.tensor(3), "h": base.half()}
    meta = {"server_round": 2, "rate": 0.1, "order": ["b", "a"]}
    folder.save_checkpoint(tensors, meta)
    first = (folder.path / "checkpoint.safetensors").read_bytes()
    read, read_meta = folder.load_checkpoint() or pytest.fail("no checkpoint")
    assert read_meta == meta
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype
    folder.save_checkpoint(tensors, meta)
    assert (folder.path / "checkpoint.safetensors").read_bytes() == first


def test_a_damaged_checkpoint_is_named(folder: RunFolder) -> None:
    (folder.path / "checkpoint.safetensors").write_bytes(b"not tensors")
    with pytest.raises(DamagedFile, match=r"checkpoint\.safetensors is damaged"):
        folder.load_checkpoint()


def test_a_checkpoint_of_another_version_is_refused(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"meta": json.dumps({"best": None, "server_round": 1}, sort_keys=True)}
    save_file({"shared/a": torch.ones(2)}, folder.path / "checkpoint.safetensors", old)
    with pytest.raises(UsageError, match="written by an older version of fedclip") as caught:
        Checkpoint.load_usable(folder)
    assert not isinstance(caught.value, DamagedFile)
    with monkeypatch.context() as patch:
        patch.setattr("fedclip.experiment.checkpoint_file.FORMAT", 3)
        folder.save_checkpoint({"shared/a": torch.ones(2)}, {"server_round": 1})
    with pytest.raises(UsageError, match="written by another version of fedclip"):
        Checkpoint.load_usable(folder)


def test_a_full_disk_keeps_the_last_good_state(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.save_checkpoint({"a": torch.ones(2)}, {"server_round": 1})
    folder.append_metrics({"server_round": 1})
    before = {name: (folder.path / name).read_bytes() for name in names(folder.path)}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        FedclipError, match=r"checkpoint\.safetensors.*No space left.*--resume"
    ) as e:
        folder.save_checkpoint({"a": torch.zeros(2)}, {"server_round": 2})
    assert e.value.exit_code == 1
    with pytest.raises(FedclipError, match=r"metrics\.jsonl cannot be written: No space left"):
        folder.append_metrics({"server_round": 2})
    with pytest.raises(FedclipError, match="adapter cannot be"), folder.writing("adapter") as path:
        files.write_synced(path, b"")
    (folder.path / "adapter").unlink()
    assert {name: (folder.path / name).read_bytes() for name in names(folder.path)} == before


HOLDER = """
import sys, time
from fedclip.experiment.folder import RunFolder
with RunFolder.open(sys.argv[1]).exclusive():
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_and_a_killed_one_is_no_obstacle(folder: RunFolder) -> None:
    command = [sys.executable, "-c", HOLDER, str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another process"), folder.exclusive():
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    (folder.path / f"{files.PART}left").write_text("by the killed one")
    with folder.exclusive():
        assert names(folder.path) == [".lock", "config.yaml"]


def test_file_modes_follow_the_umask(folder: RunFolder) -> None:
    plain = folder.path / "plain"
    plain.touch()
    written = folder.write_json("summary.json", json.loads("{}"))
    assert written.stat().st_mode == plain.stat().st_mode


def test_next_folder_counts_on(tmp_path: Path) -> None:
    assert next_folder("quick", tmp_path / "none").name == "quick-1"
    for name in ("quick-2", "quick-10", "quick-x", "other-30"):
        (tmp_path / name).mkdir()
    assert next_folder("quick", tmp_path) == tmp_path / "quick-11"
