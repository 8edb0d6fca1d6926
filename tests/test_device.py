"""What the C library is told about freed memory: by our commands, in no other process."""

import pytest

import fedclip as package
from fedclip import device as compute
from tests.support.runs import with_


@pytest.fixture
def told(monkeypatch):
    values = {}
    monkeypatch.setattr(compute, "_set_malloc", values.update)
    monkeypatch.setattr(compute, "_own_process", False)
    return values


def test_freed_memory_is_kept_until_somebody_wants_it_back(told):
    compute.keep_freed_memory()
    kept = dict(told)
    assert kept[compute._M_ARENA_MAX] == 1
    compute.return_freed_memory()
    for limit in (compute._M_MMAP_THRESHOLD, compute._M_TRIM_THRESHOLD):
        assert told[limit] < kept[limit]


def test_a_library_leaves_the_allocator_alone(told, tmp_path):
    """Neither the engine, which gains by kept memory, nor checkpointing, which wants it back."""
    short = {"federation": {"rounds": 1, "num_clients": 3}, "evaluation": {}}
    package.run(with_(**short), output=tmp_path / "a")
    package.run(with_(model={"gradient_checkpointing": True}, **short), output=tmp_path / "b")
    assert told == {}


def test_the_command_keeps_freed_memory_or_gives_it_back(told, fedclip):
    fedclip("--version")
    assert told[compute._M_MMAP_THRESHOLD] == 2**25
    small = ("model.model_name=random:tiny", "model.gradient_checkpointing=true")
    assert fedclip("info", "configs/quickstart.yaml", *small)[0] == 0
    assert told[compute._M_MMAP_THRESHOLD] == 2**20
