"""Images that strangers send: never more in memory than allowed, and decoded with care."""

from __future__ import annotations

import asyncio
import io

from fastapi import HTTPException, Request
from PIL import Image

from fedclip.data.rgb import open_rgb

# Pillow knows dozens of formats, some of which start other programs; these are enough.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000
"""Width times height of an image; a small file may unpack to far more than fits into memory."""
MAX_SECONDS = 60.0
"""Time for a whole upload, so that no client holds a connection for ever."""


async def read_upload(request: Request, max_bytes: int) -> bytes:
    """The body of a request. HTTPException 413 as soon as it is known to exceed `max_bytes`.

    415 where its content type says that it is no image, 408 where it does not come in time.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise HTTPException(415, f"the body must be an image (image/*), its content type is {kind}")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_many_bytes(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(MAX_SECONDS):
            async for chunk in request.stream():
                if len(body) + len(chunk) > max_bytes:
                    raise _too_many_bytes(max_bytes)
                body += chunk
    except TimeoutError:
        raise HTTPException(
            408, f"the image did not arrive within {MAX_SECONDS:g} seconds", _CLOSE
        ) from None
    if not body:
        raise HTTPException(422, "the body is empty; send the bytes of an image file as the body")
    return bytes(body)


def decode_upload(data: bytes) -> Image.Image:
    """Bytes of an image file to upright RGB.

    HTTPException 413 for more than MAX_PIXELS, which is seen before anything is unpacked, and 422
    for what is not an image in one of FORMATS.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
        if width * height > MAX_PIXELS:
            raise _too_many_pixels(f"{width} x {height} pixels")
        return open_rgb(io.BytesIO(data), formats=FORMATS)
    except HTTPException:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels("far too many pixels") from None
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


def _too_many_pixels(found: str) -> HTTPException:
    return HTTPException(
        413, f"the image has {found}; this server takes {MAX_PIXELS:,} at most: make it smaller"
    )
