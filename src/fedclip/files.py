"""Files written whole or not at all; JSON read and not believed; any image as RGB."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np
from PIL import Image, ImageOps

from fedclip.errors import UsageError, shortened

PART = ".part-"
"""Files and folders that are still being written begin so; a kill may leave some behind."""
# Resizing the short edge to the model's size would blow such a picture up beyond all memory.
MAX_ASPECT_RATIO = 200
_ORIENTATION = 0x0112

JSON_BYTES = 1 << 28
JSON_DEPTH = 64


def replace_file(
    target: Path, data: bytes, mode: int | None = None, previous: Path | None = None
) -> None:
    """Write a file in one step: readers see the old one or the new one.

    Its permissions are the usual ones, or `mode`, which it has from the first byte on. The old
    file is kept under the name `previous`; a kill in that instant leaves it under this name only.
    """
    descriptor, name = tempfile.mkstemp(prefix=PART, dir=target.parent)
    os.close(descriptor)
    part = Path(name)
    try:
        part.chmod(0o666 & ~umask() if mode is None else mode)
        write_synced(part, data)
        if previous is not None and target.exists():
            target.replace(previous)
        part.replace(target)
        sync(target.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def draft_file(target: Path) -> Iterator[TextIO]:
    """Lend a text file that takes the target's place in the end, unless an error comes first.

    For what is too long to hold in memory; names of files that are not UTF-8 keep their bytes.
    """
    descriptor, name = tempfile.mkstemp(prefix=PART, dir=target.parent)
    part = Path(name)
    try:
        with open(descriptor, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o666 & ~umask())
        part.replace(target)
        sync(target.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def draft_folder(parent: Path) -> Iterator[Path]:
    """Lend a folder that is gone afterwards, unless it was renamed."""
    draft = Path(tempfile.mkdtemp(prefix=PART, dir=parent))
    try:
        draft.chmod(0o777 & ~umask())
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read; OSError for a folder, a pipe or a device, which might never end."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def parse_json(data: bytes | str, where: str) -> Any:
    """Parse JSON as RFC 8259 has it, of bounded size and depth.

    Everything that the library raises on damaged or hostile text becomes a `UsageError` that
    begins with `where`: other encodings, deep nesting, endless numbers, NaN, a key that stands
    twice, half a surrogate pair.
    """
    try:
        if len(data) > JSON_BYTES:
            raise ValueError(f"it has more than {JSON_BYTES} bytes")
        text = data if isinstance(data, str) else data.decode()
        value = json.loads(text, parse_constant=_no_number, object_pairs_hook=_once_each)
        _check_depth(value)
        if "\\u" in text:  # the only way for half of a pair to come in
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UsageError(f"{where} is damaged: {reason}") from None
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; `UsageError` names the file and what is wrong."""
    try:
        with open_regular(path) as file:
            data = file.read(JSON_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    value = parse_json(data, str(path))
    if not isinstance(value, dict):
        raise UsageError(f"{path} is damaged: expected a JSON object, got {type(value).__name__}")
    return value


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key {shortened(double)} stands there twice")
    return found


def _check_depth(value: object) -> None:
    """Raise where lists and mappings lie deeper in each other than any file of ours."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > JSON_DEPTH:
            raise RecursionError
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]


def append_line(target: Path, line: bytes) -> None:
    """Add a line and wait until it is on the disk; a line that does not fit leaves no piece."""
    with target.open("ab") as file:
        start = file.tell()
        try:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.ftruncate(file.fileno(), start)
            raise


def remove_parts(folder: Path) -> None:
    """Clear away what a killed process had not finished writing."""
    for path in folder.glob(f"{PART}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, last a power cut."""
    with suppress(PermissionError):  # Windows cannot open folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def readable(path: str | Path) -> str:
    """A path for messages: bytes that are not UTF-8 as `\\xe9`, which any encoding can show."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


# --- images ---


def as_rgb(image: Image.Image | np.ndarray[Any, Any]) -> Image.Image:
    """An image as upright 8-bit RGB, as training makes of its file; RGB stays as it is.

    An array is `[height, width]` or `[height, width, channels]`, grey, RGB or RGBA. Its levels are
    0 to 255 or, of uint16, to 65535; of floats and wider integers, to the first of 1 (floats
    only), 255 and 65535 that the largest does not exceed. Raises `ValueError` for anything else.
    """
    if not isinstance(image, Image.Image):
        image = _from_array(np.asarray(image))
    image.load()
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels: too narrow for a picture")
    return to_rgb(upright(image))


def to_rgb(image: Image.Image, high: float | None = None) -> Image.Image:
    """Any mode to 8-bit RGB.

    Transparency is laid over white. 16-bit grey levels are divided by 257, whatever the image
    holds. Modes I and F do not say how far their levels go: `_to_8_bit` takes the first of 1
    (floats only), 255 and 65535 that the largest level does not exceed. So no image is stretched
    to its own extremes, but one that stays below 256 is brighter than its 16-bit neighbours.
    `high` is the largest level of the whole picture, where `image` is a part of it.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bit(np.asarray(image), high)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        if image.mode in ("RGBa", "La"):  # premultiplied: Pillow converts each one way only
            image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, "white")
        canvas.alpha_composite(layer)
        return canvas.convert("RGB")
    return image.convert("RGB")


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    """An array as an image of mode L, LA, RGB or RGBA."""
    shown = f"an array of shape {list(array.shape)} and type {array.dtype}"
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 2, 3, 4) or 0 in array.shape:
        hint = "; put the channels last" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise ValueError(f"expected [height, width] or [height, width, 1 to 4], got {shown}{hint}")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        raise ValueError(f"expected numbers, got {shown}")
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 65535:
        raise ValueError(
            f"expected levels of 0 to 1, 255 or 65535, got {shown} with {array.min():g} to "
            f"{array.max():g}; undo a normalisation first"
        )
    levels = array if array.dtype == np.uint8 else _to_8_bit(array)
    if levels.ndim == 3 and channels == 1:
        levels = levels[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(levels))


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF says."""
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged metadata says nothing about the picture
        return image


def _to_8_bit(levels: np.ndarray[Any, Any], high: float | None = None) -> np.ndarray[Any, Any]:
    """Wide levels to uint8, by one of the factors 255 (floats only), 1 and 1/257."""
    values = np.nan_to_num(levels.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    high = values.max(initial=0.0) if high is None else high
    if np.issubdtype(levels.dtype, np.floating):
        scale = 255.0 if high <= 1.0 else 1.0 if high <= 255.0 else 1 / 257
    else:  # mode "I" also carries 8-bit files; "I;16" arrives as uint16
        scale = 1 / 257 if levels.dtype.itemsize == 2 or high > 255 else 1.0
    return np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
