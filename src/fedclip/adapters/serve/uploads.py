"""Images that strangers send: never more in memory than allowed, and decoded with care."""

from __future__ import annotations

import asyncio
import io
import re
import threading
from contextlib import nullcontext
from itertools import islice, pairwise

from fastapi import HTTPException, Request
from PIL import Image

from fedclip.data.rgb import LARGE, open_rgb

# Pillow knows dozens of formats, some of which start other programs; these are enough.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
FORM = "multipart/form-data"
MAX_PARTS = 16
_FORM_LINES = 16_384
MAX_PIXELS = 50_000_000
"""Width times height of an image; a small file may unpack to far more than fits into memory."""
MAX_WEBP_PIXELS = 16_000_000
"""The same for WebP, whose decoder takes four times the memory."""
MAX_SECONDS = 60.0
"""Time for a whole upload, so that no client holds a connection for ever."""


_ONE_LARGE = threading.Lock()  # large images are decoded one at a time


async def read_upload(request: Request, max_bytes: int) -> bytes:
    """The image in a request: its body, or the one file of a form (`curl -F file=@x.jpg`).

    HTTPException 413 as soon as it is known to exceed `max_bytes`, 415 where its content type says
    that it is no image, 408 where it does not come in time.
    """
    kind, _, more = request.headers.get("content-type", "").partition(";")
    kind = kind.strip().lower()
    if kind == FORM:
        data = file_in_form(await _body(request, max_bytes, max_bytes + _FORM_LINES), more)
        if len(data) > max_bytes:
            raise _too_many_bytes(max_bytes)
        return data
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise HTTPException(
            415,
            f"the body must be an image (image/*) or a form with one, its content type is "
            f"{kind[:100]}",
        )
    return await _body(request, max_bytes, max_bytes)


def file_in_form(body: bytes, parameters: str) -> bytes:
    """The one file among the parts of a form; HTTPException 422 for none, or several."""
    found = re.search(r'boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', parameters)
    if found is None:
        raise HTTPException(422, "the form names no boundary between its parts")
    mark = rb"(?:\A|\r\n)--" + re.escape((found[1] or found[2]).encode("latin-1", "replace"))
    marks = list(islice(re.finditer(mark, body), MAX_PARTS + 1))
    if len(marks) < 2 or not body.startswith(b"--", marks[-1].end()):
        raise HTTPException(422, f"the form is not whole, or has more than {MAX_PARTS} parts")
    files = []
    for before, after in pairwise(marks):
        blank = body.find(b"\r\n\r\n", before.end(), after.start())
        if blank >= 0 and b"filename" in body[before.end() : blank].lower():
            files.append(slice(blank + 4, after.start()))  # a copy only of the one
    if len(files) != 1:
        raise HTTPException(422, f"the form must hold one image file, it holds {len(files)}")
    return body[files[0]]


async def _body(request: Request, max_bytes: int, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise _too_many_bytes(max_bytes)
    body = io.BytesIO()  # whose value is no copy
    try:
        async with asyncio.timeout(MAX_SECONDS):
            async for chunk in request.stream():
                if body.tell() + len(chunk) > limit:
                    raise _too_many_bytes(max_bytes)
                body.write(chunk)
    except TimeoutError:
        raise HTTPException(
            408, f"the image did not arrive within {MAX_SECONDS:g} seconds", _CLOSE
        ) from None
    if not body.tell():
        raise HTTPException(422, "the body is empty; send the bytes of an image file as the body")
    return body.getvalue()


def decode_upload(data: bytes) -> Image.Image:
    """Bytes of an image file to upright RGB.

    HTTPException 413 for more than MAX_PIXELS, which is seen before anything is unpacked, and 422
    for what is not an image in one of FORMATS.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            most = MAX_WEBP_PIXELS if image.format == "WEBP" else MAX_PIXELS
        if width * height > most:
            raise _too_many_pixels(f"{width} x {height} pixels", most)
        with _ONE_LARGE if width * height > LARGE else nullcontext():
            return open_rgb(io.BytesIO(data), formats=FORMATS)
    except HTTPException:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels("far too many pixels", MAX_PIXELS) from None
    except Image.UnidentifiedImageError:
        raise HTTPException(
            422, f"the body is not an image in one of the formats {', '.join(FORMATS)}"
        ) from None
    except Exception as error:  # decoders raise nearly anything on damaged data
        reason = str(error) or type(error).__name__
        raise HTTPException(422, f"the image cannot be read: {reason}") from None


# What is left of the body is not read: the connection cannot be used again.
_CLOSE = {"Connection": "close"}


def _too_many_bytes(max_bytes: int) -> HTTPException:
    return HTTPException(
        413,
        f"the image has more than {max_bytes / 1e6:g} MB, the most that this server takes "
        "(--max-mb)",
        _CLOSE,
    )


def _too_many_pixels(found: str, most: int) -> HTTPException:
    return HTTPException(
        413, f"the image has {found}; this server takes {most:,} at most: make it smaller"
    )
