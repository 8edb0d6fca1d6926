"""Images on disk: found by file, folder or pattern, and read."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from fedclip.data.picture_types import readable_suffixes
from fedclip.data.rgb import open_rgb
from fedclip.errors import UsageError
from fedclip.files import readable


def find_images(arguments: Sequence[str | Path]) -> list[str]:
    """Paths of images, in the order of the arguments.

    A file stands for itself, whatever its name. A folder gives the images in it and below it, by
    name; a pattern (`*`, `?`, `[...]`, `**` for any depth) gives those that fit, folders included.
    Files with other suffixes and hidden ones are passed over. UsageError where there is none.
    """
    found: list[str] = []
    for argument in map(str, arguments):
        if os.path.isdir(argument):
            images = _below(argument)
            what = "folder"
        elif glob.has_magic(argument) and not os.path.lexists(argument):
            images = _fitting(argument)
            what = "pattern"
        else:
            found.append(argument)
            continue
        if not images:
            raise UsageError(
                f"{argument}: this {what} has no images; expected files ending in "
                f"{', '.join(sorted(readable_suffixes()))}"
            )
        found += images
    return found


def read_image(path: str | Path) -> Image.Image:
    """An image file as upright RGB; UsageError that names the file where it cannot be read."""
    try:
        with warnings.catch_warnings():
            # Decoders warn of odd metadata; past twice its limit Pillow refuses a bomb by error.
            warnings.simplefilter("ignore")
            return open_rgb(Path(path))
    except FileNotFoundError:
        raise UsageError(f"{readable(path)}: there is no such image file") from None
    except Exception as error:  # decoders raise nearly anything on a damaged file
        reason = str(error) or type(error).__name__
        raise UsageError(f"{readable(path)}: not an image that can be read: {reason}") from None


def _fitting(pattern: str) -> list[str]:
    images: list[str] = []
    for path in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isfile(path) and _is_image(path):
            images.append(path)
        elif os.path.isdir(path) and not pattern.rstrip(os.sep).endswith("**"):
            images += _below(path)
    return images


def _below(folder: str) -> list[str]:
    images: list[str] = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images += [
            os.path.join(where, name)
            for name in sorted(names)
            if _is_image(os.path.join(where, name))
        ]
    return images


def _is_image(path: str) -> bool:
    name = os.path.basename(path)
    suffix = os.path.splitext(name)[1].lower()
    # A pipe or a device among the images is none of them; a broken link is a bad image.
    special = os.path.exists(path) and not os.path.isfile(path)
    return not name.startswith(".") and suffix in readable_suffixes() and not special
