"""What the C library is told about freed memory, and that the last word holds."""

import pytest

from fedclip import device as compute


@pytest.fixture
def told(monkeypatch):
    values = {}
    monkeypatch.setattr(compute, "_set_malloc", values.update)
    monkeypatch.setattr(compute, "_returned", False)
    return values


def test_freed_memory_is_kept_until_somebody_wants_it_back(told):
    compute.keep_freed_memory()
    kept = dict(told)
    assert kept[compute._M_ARENA_MAX] == 1
    compute.return_freed_memory()
    returned = dict(told)
    for limit in (compute._M_MMAP_THRESHOLD, compute._M_TRIM_THRESHOLD):
        assert returned[limit] < kept[limit]
    compute.keep_freed_memory()  # such as an engine's, made after a model with checkpointing
    assert told == returned
