"""Damaged pictures, and whole ones in unusual clothes, which must come out as they are."""

from __future__ import annotations

import random
import shutil
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.fuzz_damage import Damaged, in_bytes, in_place_of
from fedclip.adapters.find_images import find_images, read_image
from fedclip.data.datasets import load_source
from fedclip.data.decode import decode
from fedclip.errors import UsageError

Pixels = NDArray[np.uint8]
LOSSLESS = ("PNG", "BMP", "TIFF", "PPM", "WEBP")
SUFFIXES = (".png", ".jpg", ".webp", ".gif", ".bmp", ".tif", ".ppm", ".JPEG", ".jpe")
HUGE = (0, 1, 300, 65535, 100_000, 2**31 - 1, 2**32 - 1)


@dataclass(frozen=True)
class Picture:
    """A file; what it shows, if that is known: `exact`, or else it may be refused."""

    file: Path
    shows: Pixels | None
    exact: bool
    folder: bool
    what: str


def make(rng: random.Random, place: Path) -> Picture:
    """A picture that is damaged, cut off, of impossible size, no file, or only unusual."""
    shutil.rmtree(place / "images", ignore_errors=True)
    for name in ("cat", "dog"):
        (place / "images" / name).mkdir(parents=True)
        Image.fromarray(_noise(0)).save(place / "images" / name / "good.png")
    file = place / "images" / "cat" / f"x{rng.choice(SUFFIXES)}"
    shows, exact = None, False
    how = rng.choice(["unusual", "bytes", "bytes", "bytes", "cut", "cut", "huge", "other", "eps"])
    if how == "unusual":
        data, shows = _unusual(rng)
        exact = True
    elif how in ("bytes", "cut"):
        kind, data, decoded = rng.choice(_pictures())
        # What was cut off, and what a checksum tells of, cannot pass as the picture.
        told = how == "cut" or kind == "PNG"
        shows = decoded if told else None
        data = data[: rng.randrange(len(data))] if how == "cut" else in_bytes(rng, data)
        how = f"{how} of {kind}"
    elif how == "huge":
        data = _huge(rng)
    elif how == "eps":
        data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) print\n"
    else:
        data = b"x"
    file.write_bytes(data)
    if how == "other":
        in_place_of(rng, file)
    return Picture(file, shows, exact, rng.random() < 0.2, how)


def read(case: Picture) -> None:
    """Opens a picture by itself, or with the folder that it lies in."""
    if case.folder:
        _read_folder(case)
        return
    try:
        found = np.asarray(read_image(case.file))
    except UsageError:
        if case.exact:
            raise Damaged(f"{case.what}: a whole picture is refused") from None
        raise
    _check(case, found)


def _read_folder(case: Picture) -> None:
    root = case.file.parents[1]
    find_images([root])
    source = load_source("imagefolder", path=str(root))
    seen: list[Pixels] = []

    def keep(images: Sequence[Any]) -> Pixels:
        seen.extend(np.asarray(image) for image in images)
        return np.zeros((len(images), 1, 1, 1), np.uint8)

    _, bad = decode(source, np.arange(len(source)), keep, "fuzz")
    names = [Path(source.images.path_of(i)).name for i in range(len(source))]
    if names.count("good.png") != 2 or any("good" in str(b) for b in bad):
        raise Damaged(f"{case.what}: a neighbour is lost")
    if case.exact and bad:
        raise Damaged(f"{case.what}: a whole picture is refused")
    if case.file.name in names and not bad:
        _check(case, seen[1 + names.index(case.file.name)])


def _check(case: Picture, found: Pixels) -> None:
    if found.ndim != 3 or found.shape[2] != 3 or found.dtype != np.uint8:
        raise Damaged(f"{case.what}: not 8-bit RGB")
    if case.shows is None:
        return
    if found.shape != case.shows.shape or np.abs(found.astype(int) - case.shows).max() > 1:
        raise Damaged(f"{case.what}: shows something else")


def _noise(seed: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (24, 30, 3), np.uint8)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@cache
def _pictures() -> list[tuple[str, bytes, Pixels]]:
    """Whole pictures of all formats that are read, and their pixels."""
    photo = Image.fromarray(_noise(1))
    grey, palette = photo.convert("L"), photo.quantize(16)
    made = [
        ("PNG", _saved(photo, "PNG")),
        ("PNG", _saved(grey, "PNG")),
        ("PNG", _saved(palette, "PNG", transparency=3)),
        ("PNG", _saved(photo.convert("RGBA"), "PNG")),
        ("JPEG", _saved(photo, "JPEG")),
        ("JPEG", _saved(grey, "JPEG")),
        ("JPEG", _saved(photo, "JPEG", progressive=True)),
        ("JPEG", _saved(photo.convert("CMYK"), "JPEG")),
        ("GIF", _saved(palette, "GIF")),
        ("BMP", _saved(photo, "BMP")),
        ("PPM", _saved(photo, "PPM")),
        ("TIFF", _saved(photo, "TIFF")),
        ("TIFF", _saved(photo, "TIFF", compression="tiff_lzw")),
        ("TIFF", _saved(photo, "TIFF", compression="tiff_deflate")),
        ("WEBP", _saved(photo, "WEBP", lossless=True)),
        ("WEBP", _saved(photo, "WEBP")),
        ("JPEG2000", _saved(photo, "JPEG2000")),
    ]
    return [(kind, data, _decoded(data)) for kind, data in made]


def _decoded(data: bytes) -> Pixels:
    image = Image.open(BytesIO(data))
    layer = image.convert("RGBA")
    canvas = Image.new("RGBA", layer.size, "white")
    canvas.alpha_composite(layer)
    return np.asarray(canvas.convert("RGB"))


def _unusual(rng: random.Random) -> tuple[bytes, Pixels]:
    """A whole picture, and the pixels that a person sees."""
    shown = _noise(rng.randrange(1000))
    match rng.randrange(6):
        case 0:  # turned by EXIF: rows and columns from the file to what is seen
            turned = rng.randint(1, 8)
            stored = {
                1: shown,
                2: shown[:, ::-1],
                3: shown[::-1, ::-1],
                4: shown[::-1],
                5: shown.transpose(1, 0, 2),
                6: np.rot90(shown),
                7: shown[::-1, ::-1].transpose(1, 0, 2),
                8: np.rot90(shown, -1),
            }[turned]
            exif = Image.Exif()
            exif[0x0112] = turned
            image = Image.fromarray(np.ascontiguousarray(stored))
            return _saved(image, rng.choice(["PNG", "TIFF"]), exif=exif), shown
        case 1:  # transparency over white
            alpha = np.random.default_rng(1).integers(0, 256, (24, 30, 1), np.uint8)
            seen = (shown * (alpha / 255) + 255 * (1 - alpha / 255)).round().astype(np.uint8)
            image = Image.fromarray(np.concatenate([shown, alpha], axis=2))
            return _saved(image, rng.choice(["PNG", "TIFF"])), seen
        case 2:  # one level of 16-bit grey
            level = rng.randrange(256)
            image = Image.fromarray(np.full((24, 30), 257 * level, np.uint16))
            return _saved(image, rng.choice(["PNG", "TIFF"])), np.full((24, 30, 3), level, np.uint8)
        case 3:  # one colour of RGB stands for transparent
            colour = tuple(int(c) for c in shown[0, 0])
            seen = shown.copy()
            seen[(shown == colour).all(axis=2)] = 255
            return _saved(Image.fromarray(shown), "PNG", transparency=colour), seen
        case 4:  # EXIF that says nothing
            junk = b"Exif\0\0" + bytes(rng.randrange(256) for _ in range(40))
            return _saved(Image.fromarray(shown), "PNG", exif=junk), shown
        case _:
            return _saved(Image.fromarray(shown), rng.choice(LOSSLESS), lossless=True), shown


def _huge(rng: random.Random) -> bytes:
    """A header that tells of an impossible or enormous picture, with next to nothing behind it."""
    width, height = rng.choice(HUGE), rng.choice(HUGE)
    match rng.randrange(5):
        case 0:
            head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
            body = zlib.compress(b"\0" * 1000)
            chunks = ((b"IHDR", head), (b"IDAT", body), (b"IEND", b""))
            return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)
        case 1:
            return b"P6\n%d %d\n255\n" % (width, height) + b"\0" * 100
        case 2:
            head = struct.pack(
                "<IiiHHIIiiII", 40, width & 2**31 - 1, height & 2**31 - 1, 1, 24, *[0] * 6
            )
            return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head + b"\0" * 100
        case 3:
            size = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
            return (
                b"GIF89a"
                + size
                + b"\x80\0\0"
                + b"\0" * 6
                + b",\0\0\0\0"
                + size
                + b"\0\x02\x02L\x01\0;"
            )
        case _:
            data = bytearray(_pictures()[4][1])
            at = data.index(b"\xff\xc0")
            data[at + 5 : at + 9] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
            return bytes(data)


def _chunk(name: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + check
