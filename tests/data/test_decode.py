"""Any image file to RGB, and bad ones by name."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedclip.data.decode import decode
from fedclip.data.rgb import open_rgb
from fedclip.data.source import ArrayImages, FileImages, ImageSource
from fedclip.errors import UsageError
from fedclip.files import to_rgb
from tests.support.data import SIZE, source_of, to_pixels


def one_pixel(image: Image.Image) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (2, 2), 100), (100, 100, 100)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 128)), (127, 127, 127)),
        (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("I;16", (2, 2), 65535), (255, 255, 255)),
        (Image.new("I;16", (2, 2), 257 * 100), (100, 100, 100)),
        (Image.new("I", (2, 2), 200), (200, 200, 200)),
        (Image.new("F", (2, 2), 0.5), (128, 128, 128)),
        (Image.new("RGB", (2, 2), (1, 2, 3)), (1, 2, 3)),
    ],
)
def test_every_mode_becomes_rgb(image, expected):
    assert one_pixel(to_rgb(image)) == expected


def test_palette_transparency_is_laid_over_white(tmp_path):
    image = Image.new("P", (2, 2), 0)
    image.putpalette([10, 20, 30] * 256)
    image.save(tmp_path / "clear.png", transparency=0)
    assert one_pixel(open_rgb(tmp_path / "clear.png")) == (255, 255, 255)
    image.save(tmp_path / "solid.png")
    assert one_pixel(open_rgb(tmp_path / "solid.png")) == (10, 20, 30)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_rgb(tmp_path / "turned.jpg").size == (2, 4)


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    image = Image.new("RGB", (4, 2))
    image.save(tmp_path / "odd.jpg", exif=b"Exif\x00\x00MM\x00*garbage that is no directory")
    pixels, bad = decode(source_of(FileImages(tmp_path, ("odd.jpg",))), np.arange(1), to_pixels, "")
    assert pixels.shape == (1, 3, SIZE, SIZE)
    assert not bad


def bomb() -> bytes:
    """A few bytes that claim to be a picture of 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))


@pytest.fixture
def damaged(tmp_path) -> ImageSource:
    good = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(good, "JPEG")
    files = {
        "bomb.png": bomb(),
        "empty.png": b"",
        "fine.jpg": good.getvalue(),
        "narrow.png": None,
        "text.png": b"this is no picture at all",
        "truncated.jpg": good.getvalue()[:1500],
    }
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    Image.new("L", (2000, 2)).save(tmp_path / "narrow.png")
    return source_of(FileImages(tmp_path, (*files, "gone.png")))


def test_bad_images_are_named_and_skipped(damaged):
    pixels, bad = decode(damaged, np.arange(7), to_pixels, "key")
    assert [Path(image.path).name for image in bad] == [
        "bomb.png",
        "empty.png",
        "narrow.png",
        "text.png",
        "truncated.jpg",
        "gone.png",
    ]
    assert [image.position for image in bad] == [0, 1, 3, 4, 5, 6]
    assert pixels[2].any()
    assert not pixels[[0, 1, 3, 4, 5, 6]].any()
    reasons = {Path(image.path).name: image.reason for image in bad}
    assert "decompression bomb" in reasons["bomb.png"]
    assert reasons["gone.png"] == "No such file or directory"
    assert reasons["text.png"] == "cannot identify image file"
    assert "truncated" in reasons["truncated.jpg"]
    assert "too narrow" in reasons["narrow.png"]


def test_bad_images_are_an_error_where_asked(damaged):
    with pytest.raises(UsageError) as caught:
        decode(damaged, np.arange(7), to_pixels, "key", on_bad_image="error")
    message = str(caught.value)
    assert "6 of 7 images cannot be read" in message
    assert "bomb.png" in message
    assert "and 3 more" in message
    assert "data.on_bad_image: skip" in message


def random_images(n: int = 600) -> ArrayImages:
    rng = np.random.default_rng(0)
    return ArrayImages(rng.integers(0, 256, (n, SIZE, SIZE), dtype=np.uint8), "random")


def test_progress_counts_every_image():
    seen = []
    decode(
        source_of(random_images()),
        np.arange(600),
        to_pixels,
        "key",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(256, 600), (512, 600), (600, 600)]


def test_large_pictures_make_small_chunks(monkeypatch):
    monkeypatch.setattr("fedclip.data.decode.CHUNK_PIXELS", 3 * SIZE * SIZE)
    sizes = []

    def counted(images):
        sizes.append(len(images))
        return to_pixels(images)

    decode(source_of(random_images(7)), np.arange(7), counted, "key")
    assert sizes == [1, 3, 3, 1]  # the first asks for the shape


def test_a_file_changed_in_place_is_noticed_though_size_and_time_stay(tmp_path):
    file = tmp_path / "a.ppm"
    file.write_bytes(b"P6 1 1 255\n\x01\x02\x03")
    source = source_of(FileImages(tmp_path, ("a.ppm",)))
    before, times = source.fingerprint([0]), file.stat()
    file.write_bytes(b"P6 1 1 255\n\x01\x02\x04")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert source.fingerprint([0]) != before
