"""The memory-mapped cache of decoded pixels: reuse, identity, failure, two at once."""

from __future__ import annotations

import multiprocessing
import os
import random
from pathlib import Path

import numpy as np
import pytest

from fedclip.data import cache as cache_module
from fedclip.data.cache import PixelCache, cache_folder
from fedclip.data.decode import decode
from fedclip.data.source import ArrayImages, FileImages
from fedclip.errors import FedclipError, FedclipWarning, UsageError
from tests.support.data import SIZE, source_of, to_pixels


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FEDCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def random_images(n: int = 600) -> ArrayImages:
    rng = np.random.default_rng(0)
    return ArrayImages(rng.integers(0, 256, (n, SIZE, SIZE), dtype=np.uint8), "random")


def test_in_memory_and_cached_pixels_are_the_same(cache):
    source, indices = source_of(random_images()), np.arange(600)
    in_memory, _ = decode(source, indices, to_pixels, "key")
    assert not cache.exists()
    cached, _ = decode(source, indices, to_pixels, "key", memory_gb=0)
    assert isinstance(cached, np.memmap)
    assert not cached.flags.writeable
    np.testing.assert_array_equal(cached, in_memory)
    # Made by hand: a grey picture of the right size is itself, three times.
    np.testing.assert_array_equal(in_memory[7, 1], random_images().array[7])


def test_the_second_load_decodes_nothing(cache, monkeypatch):
    source = source_of(random_images())
    calls = []
    first, _ = decode(source, np.arange(600), to_pixels, "key", memory_gb=0)

    def refuse(self, index):
        raise AssertionError("decoded again")

    monkeypatch.setattr(ArrayImages, "open", refuse)
    second, _ = decode(
        source, np.arange(600), to_pixels, "key", memory_gb=0, progress=lambda *at: calls.append(at)
    )
    np.testing.assert_array_equal(first, second)
    assert not calls


def test_bad_images_are_remembered_with_the_cache(cache, tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    damaged = source_of(FileImages(tmp_path, ("gone.png", "text.png")))
    _, first = decode(damaged, np.arange(2), to_pixels, "key", memory_gb=0)
    monkeypatch.setattr(FileImages, "open", None)
    _, second = decode(damaged, np.arange(2), to_pixels, "key", memory_gb=0)
    assert first == second
    assert [image.position for image in second] == [0, 1]
    with pytest.raises(UsageError, match="2 of 2 images"):
        decode(damaged, np.arange(2), to_pixels, "key", memory_gb=0, on_bad_image="error")


def test_content_preprocessing_and_choice_each_have_their_own_cache(cache):
    source = source_of(random_images())
    decode(source, np.arange(600), to_pixels, "key", memory_gb=0)
    decode(source, np.arange(600), to_pixels, "other key", memory_gb=0)
    decode(source, np.arange(599), to_pixels, "key", memory_gb=0)
    source.images.array[5, 0, 0] ^= 1
    decode(source, np.arange(600), to_pixels, "key", memory_gb=0)
    assert len(list(cache.iterdir())) == 4


def flipped(data):
    """200 places, of which each damages a cache alone."""
    chance = random.Random(0)
    for _ in range(200):
        at = chance.randrange(len(data))
        yield data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def test_every_flipped_bit_of_a_cache_is_noticed(cache):
    shape = (4, 3, SIZE, SIZE)
    made = PixelCache("content", "key")
    made.load_or_make(shape, lambda: iter([(np.ones(shape, np.uint8), [(1, "why")])]))
    for name in ("pixels.npy", "bad.json", "digests.json"):
        good = (made.folder / name).read_bytes()
        for data in flipped(good):
            (made.folder / name).write_bytes(data)
            assert made._load(shape) is None
        (made.folder / name).write_bytes(good)
    assert made._load(shape) is not None


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("pixels.npy", lambda data: data[:1000]),
        ("pixels.npy", lambda data: b""),
        ("pixels.npy", lambda data: data[:10] + b"(" * 100 + data[110:]),
        ("pixels.npy", lambda data: data[:300] + bytes([data[300] ^ 255]) + data[301:]),
        ("bad.json", lambda data: b"5"),
        ("bad.json", lambda data: b"[1]"),
        ("digests.json", lambda data: b"[" * 100000),
        ("digests.json", None),  # as an older version left it
    ],
)
def test_a_damaged_cache_is_made_again(cache, name, damage):
    source = source_of(random_images())
    first, _ = decode(source, np.arange(600), to_pixels, "key", memory_gb=0)
    expected = np.array(first)
    (made,) = cache.iterdir()
    if damage is None:
        (made / name).unlink()
    else:
        (made / name).write_bytes(damage((made / name).read_bytes()))
    with pytest.warns(FedclipWarning, match="is damaged, or of an older version"):
        again, _ = decode(source, np.arange(600), to_pixels, "key", memory_gb=0)
    np.testing.assert_array_equal(again, expected)
    assert len(list(cache.iterdir())) == 1


def test_a_failure_half_way_leaves_nothing(cache):
    source = source_of(random_images())

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(source, np.arange(600), to_pixels, "key", memory_gb=0, progress=stop)
    assert not list(cache.iterdir())


def test_what_killed_runs_left_is_swept_in_time(cache):
    old, new = cache / ".pixels-old", cache / ".pixels-new"
    old.mkdir(parents=True)
    new.mkdir()
    os.utime(old, (0, 0))
    decode(source_of(random_images()), np.arange(600), to_pixels, "key", memory_gb=0)
    assert not old.exists()
    assert new.exists()


def test_a_full_disk_says_so(cache, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    with pytest.raises(FedclipError, match=r"No space left on device.*FEDCLIP_CACHE") as caught:
        decode(source_of(random_images()), np.arange(600), to_pixels, "key", memory_gb=0)
    assert caught.value.exit_code == 1
    assert not list(cache.iterdir())


def _make(folder: str, barrier, results) -> None:
    os.environ["FEDCLIP_CACHE"] = folder
    barrier.wait()

    def chunks():
        for start in range(0, 400, 50):
            yield np.full((50, 3, SIZE, SIZE), start // 50, dtype=np.uint8), []

    pixels, _ = PixelCache("content", "key").load_or_make((400, 3, SIZE, SIZE), chunks)
    results.put(int(pixels.sum(dtype=np.int64)))


def test_two_processes_at_once_make_one_cache(cache):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_make, args=(str(cache), barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    sums = [results.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    assert sums == [28 * 50 * 3 * SIZE * SIZE] * 2
    assert len(list(cache.iterdir())) == 1


def test_the_cache_folder_is_the_platforms(monkeypatch, tmp_path):
    monkeypatch.delenv("FEDCLIP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache_module.sys, "platform", "linux")
    assert cache_folder() == tmp_path / "fedclip"
    monkeypatch.setattr(cache_module.sys, "platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "fedclip"
    monkeypatch.setenv("FEDCLIP_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
