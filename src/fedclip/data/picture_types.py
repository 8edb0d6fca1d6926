"""Which picture files are read, by Pillow alone, and which are pictures that are not."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec

# Pillow knows dozens of formats, some of which start other programs: EPS runs Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
)
HEIC = (".heic", ".heif", ".hif")
UNREAD = {
    *(".avif", ".jxl", ".jp2", ".j2k", ".jpf", ".svg", ".svgz", ".eps", ".ai", ".wmf", ".emf"),
    *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".orf", ".rw2"),
    *(".raf", ".pef", ".srw", ".x3f", ".raw", ".rwl", ".3fr", ".erf", ".kdc", ".iiq", ".mrw"),
    *(".psd", ".psb", ".xcf", ".tga", ".ico", ".icns", ".dds", ".exr", ".hdr", ".pcx", ".bpg"),
    *(".dcm", ".dicom", ".pnm", ".pam", ".pfm", ".qoi", ".sgi", ".xbm", ".xpm", ".apng", ".mpo"),
}
"""Suffixes of pictures that are not read."""
SPECIAL, BROKEN = "pipe or device", "broken link"


@cache
def reads_heic() -> bool:
    """Whether HEIC is read: where `pillow-heif` is installed, which this makes known to Pillow."""
    if find_spec("pillow_heif") is None:
        return False
    import_module("pillow_heif").register_heif_opener()
    return True


def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    return (*FORMATS, "HEIF") if reads_heic() else FORMATS


def readable_suffixes() -> tuple[str, ...]:
    """Ends of the names of files that are taken for images in folders."""
    return (*SUFFIXES, *HEIC) if reads_heic() else SUFFIXES


def unread_type(name: str) -> str | None:
    """The suffix of a picture of a type that is not read; None for anything else."""
    suffix = os.path.splitext(name)[1].lower()
    known = UNREAD if reads_heic() else UNREAD.union(HEIC)
    return suffix if suffix in known else None


def in_words(passed: Mapping[str, Mapping[str, int]]) -> str:
    """Numbers of files passed over, by type and by site ('' where there are none).

    `5 .heic (oslo 3, bonn 2), 1 .dng (oslo)`.
    """
    totals: Counter[str] = Counter()
    for counts in passed.values():
        totals.update(counts)
    words = []
    for kind, total in totals.most_common():
        sites = [(site, counts[kind]) for site, counts in passed.items() if site and kind in counts]
        named = ", ".join(f"{site} {n}" for site, n in sites[:12])
        more = f" and {len(sites) - 12} more" if len(sites) > 12 else ""
        words.append(f"{total} {kind}" + (f" ({named}{more})" if named else ""))
    return ", ".join(words)


def advice(kinds: Iterable[str]) -> str:
    """What to do about files of these types."""
    if set(kinds) & set(HEIC):
        return (
            "convert them to JPEG or PNG, or for HEIC install pillow-heif (fedclip's extra `heic`)"
        )
    if set(kinds) <= {SPECIAL, BROKEN}:
        return "put files there, or remove them"
    return "convert them to JPEG or PNG"
