"""Which files are opened as pictures, and what is said of the others."""

from __future__ import annotations

import os
import stat
import sys
import types
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedclip.adapters.find_images import find_images, read_image
from fedclip.config.loading import config_from_dict
from fedclip.data import picture_types
from fedclip.data.rgb import LARGE, full_size, open_rgb
from fedclip.data.sources.imagefolder import imagefolder
from fedclip.deploy.site.config import SiteConfig
from fedclip.deploy.site.policy import preflight
from fedclip.errors import FedclipWarning, UsageError
from fedclip.experiment.survey import survey
from fedclip.reports.progress import Listener
from tests.conftest import Command

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(hi) print\n"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names and pipes of Linux")


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    """Two sites with two classes of eight pictures each."""
    home = tmp_path / "images"
    for site in ("oslo", "bonn"):
        for level, name in enumerate(("cat", "dog")):
            (home / site / name).mkdir(parents=True)
            for i in range(8):
                pixels = np.full((240, 300, 3), 20 * i + level, np.uint8)
                Image.fromarray(pixels).save(home / site / name / f"{i}.png")
    return home


def test_eps_under_another_name_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {ran}\necho 10\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "cat.png").write_bytes(EPS)
    with pytest.raises(UsageError, match=r"cat\.png: .*cannot identify image file$"):
        read_image(tmp_path / "cat.png")
    with pytest.raises(OSError, match="cannot identify"):
        open_rgb(BytesIO(EPS))
    assert not ran.exists()


@linux
def test_pipes_and_devices_are_passed_over_and_counted(sites: Path) -> None:
    os.mkfifo(sites / "oslo" / "cat" / "pipe.png")
    (sites / "bonn" / "dog" / "zero.jpg").symlink_to("/dev/zero")
    with pytest.warns(FedclipWarning, match=r"2 pipe or device \(bonn 1, oslo 1\)"):
        source = imagefolder(str(sites))
    assert len(source) == 32
    assert len(find_images([sites])) == 32
    for path in (sites / "oslo" / "cat" / "pipe.png", sites / "bonn" / "dog" / "zero.jpg"):
        with pytest.raises(UsageError, match="not a regular file"):
            read_image(path)


def test_unread_types_are_counted_by_type_and_site(sites: Path) -> None:
    for i in range(5):
        (sites / "oslo" / "cat" / f"{i}.HEIC").write_bytes(b"x")
    for name in ("a.dng", "b.svg", "c.cr2", "notes.txt", ".hidden.heic"):
        (sites / "bonn" / "dog" / name).write_bytes(b"x")
    with pytest.warns(FedclipWarning, match=r"5 \.heic \(oslo 5\)") as told:
        source = imagefolder(str(sites))
    assert "pillow-heif" in str(told[0].message)
    assert source.passed_over["oslo"] == {".heic": 5}
    assert source.passed_over["bonn"] == {".dng": 1, ".svg": 1, ".cr2": 1}


def test_a_folder_of_unread_types_says_so(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    for i in range(3):
        (tmp_path / "cat" / f"{i}.heic").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"no images below .*, only 3 \.heic, which are not read"):
        imagefolder(str(tmp_path))


def test_heic_is_read_where_pillow_heif_is(sites: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[bool] = []
    package = types.ModuleType("pillow_heif")
    package.register_heif_opener = lambda: registered.append(True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    monkeypatch.setattr(picture_types, "find_spec", lambda name: object())
    picture_types.reads_heic.cache_clear()
    try:
        (sites / "oslo" / "cat" / "x.heic").write_bytes(b"x")
        assert len(imagefolder(str(sites))) == 33
        assert picture_types.readable_formats()[-1] == "HEIF"
        assert registered == [True]
    finally:
        picture_types.reads_heic.cache_clear()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("I;16", "PNG"),
        ("P", "PNG"),
        ("L", "TIFF"),
        ("RGB", "JPEG"),
    ],
)
def test_large_pictures_come_out_smaller_and_alike(mode: str, kind: str) -> None:
    edge = 3600
    assert edge * edge > LARGE
    ramp = np.linspace(0, 255, edge).astype(np.uint8)
    levels = np.broadcast_to(ramp, (edge, edge))
    grey = Image.fromarray(np.ascontiguousarray(levels))
    if mode == "I;16":
        picture = Image.fromarray(np.ascontiguousarray(levels).astype(np.uint16) * 257)
    else:
        picture = grey.convert(mode)
    file = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down, so that the ramp falls
    picture.save(file, kind, exif=exif)
    made = open_rgb(file)
    assert full_size(made) == (edge, edge)
    assert 672 <= min(made.size) < 1000
    row = np.asarray(made)[made.height // 2, :, 0].astype(float)
    expected = np.linspace(255, 0, made.width)
    assert np.abs(row - expected).max() < 6


@linux
def test_names_that_are_not_utf_8(sites: Path) -> None:
    home = os.fsencode(sites)
    os.rename(home + b"/oslo/cat/0.png", home + b"/oslo/cat/\xfc.png")
    source = imagefolder(str(sites))
    shown = [source.images.path_of(i) for i in range(len(source))]
    assert sum(r"\xfc.png" in path for path in shown) == 1
    for index in range(len(source)):
        source.images.open(index)
    os.rename(home + b"/oslo/cat", home + b"/oslo/caf\xe9")
    with pytest.raises(UsageError, match=r"folder .*caf\\xe9 is not UTF-8"):
        imagefolder(str(sites))


def test_a_survey_tells_who_has_what(sites: Path) -> None:
    (sites / "bonn" / "dog" / "bad.png").write_bytes(b"x")
    (sites / "bonn" / "dog" / "x.dng").write_bytes(b"x")
    config = config_from_dict({"data": {"name": "imagefolder", "path": str(sites)}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FedclipWarning)
        (facts,) = survey(config, Listener())
    assert facts["damaged"] == 1
    assert facts["passed_over"] == "1 .dng (bonn 1)"
    assert facts["smallest_image"] == facts["largest_image"] == "300 x 240"
    assert facts["model_input"] == "32 x 32"
    assert facts["shrunk"].startswith("7.5-fold")
    assert facts["table"] == [
        {"site": site, "images": 16, "class cat": 8, "class dog": 8} for site in ("bonn", "oslo")
    ]


def test_validate_opens_images_where_it_is_asked(
    sites: Path, tmp_path: Path, fedclip: Command
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"data: {{name: imagefolder, path: {sites}}}\n")
    code, out, err = fedclip("validate", file)
    assert (code, out) == (0, f"{file}: valid\n")
    assert "not at images" in err
    code, out, err = fedclip("validate", file, "--data")
    assert code == 0
    assert "7.5-fold" in out
    assert "not at images" not in err
    assert fedclip("validate", file, "--data", f"data.path={tmp_path}/none")[0] == 2


def test_a_site_decodes_every_image_when_it_is_checked(sites: Path, tmp_path: Path) -> None:
    (sites / "oslo" / "cat" / "bad.png").write_bytes(b"x")
    values = {"data": {"path": str(sites / "oslo")}, "state": str(tmp_path / "state")}
    values |= {"free_memory_gb": 0.0, "free_disk_gb": 0.0}
    facts = preflight(SiteConfig.model_validate(values), every_image=True)
    assert facts["damaged"].startswith("1 of 17 images cannot be read: ")
    values["data"] = {"path": str(sites / "oslo"), "on_bad_image": "error"}
    with pytest.raises(UsageError, match="1 of 17 images cannot be read"):
        preflight(SiteConfig.model_validate(values), every_image=True)
