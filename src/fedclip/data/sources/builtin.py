"""Built-in data sets: digits, fashion_mnist, icons."""

from __future__ import annotations

import gzip
import struct
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedclip.data.prompts import PROMPTS
from fedclip.data.source import ArrayImages, ImageSource, mask_or_none
from fedclip.errors import UsageError

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_HUB = "zalando-datasets/fashion_mnist"


def digits(path: str | None = None, layout: str = "auto") -> ImageSource:
    """1,797 handwritten digits of 8 x 8 pixels from scikit-learn, without a test split."""
    if path:
        raise UsageError(
            f"data.path: digits come with scikit-learn and have no path, got {path!r}; leave it "
            "out, or set data.name to imagefolder or hub"
        )
    # The file that sklearn.datasets.load_digits reads: importing it takes two seconds of a CPU.
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise UsageError("data.name: digits are a file of scikit-learn: pip install scikit-learn")
    table = np.loadtxt(Path(spec.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")
    images = table[:, :-1].reshape(-1, 8, 8)
    pixels = np.rint(images * (255 / 16)).astype(np.uint8)  # levels 0..16 -> 0..255
    prompts = PROMPTS["digits"]
    return ImageSource(
        name="digits",
        images=ArrayImages(pixels, "digits"),
        labels=table[:, -1].astype(np.int64),
        class_names=prompts.class_names or (),
        templates=prompts.templates,
    )


def fashion_mnist(path: str | None = None, layout: str = "auto") -> ImageSource:
    """60,000 + 10,000 clothing photos of 28 x 28 pixels, with a predefined test split.

    Read from `path` or Debian's package where one of them has the IDX files, else from the hub.
    """
    folder = Path(path).expanduser() if path else FASHION_FOLDER
    prompts = PROMPTS["fashion_mnist"]
    if not (folder / "train-images-idx3-ubyte.gz").is_file():
        if path:
            raise UsageError(
                f"data.path: no Fashion-MNIST in {folder}, which has no "
                "train-images-idx3-ubyte.gz; leave data.path out to use Debian's package or the hub"
            )
        return _fashion_from_hub()
    images, labels = [], []
    for part in ("train", "t10k"):
        images.append(read_idx(folder / f"{part}-images-idx3-ubyte.gz"))
        labels.append(read_idx(folder / f"{part}-labels-idx1-ubyte.gz"))
    is_test = np.repeat([False, True], [len(part) for part in labels])
    return ImageSource(
        name="fashion_mnist",
        images=ArrayImages(np.concatenate(images), "fashion_mnist"),
        labels=np.concatenate(labels).astype(np.int64),
        class_names=prompts.class_names or (),
        templates=prompts.templates,
        is_test=is_test,
    )


def _fashion_from_hub() -> ImageSource:
    from dataclasses import replace

    from fedclip.data.sources.hub import hub

    prompts = PROMPTS["fashion_mnist"]
    try:
        source = hub(FASHION_HUB)
    except UsageError as error:
        raise UsageError(
            "data.name: fashion_mnist was found neither in Debian's files "
            f"({FASHION_FOLDER}) nor on the Hugging Face hub; get either: "
            f"`apt-get install dataset-fashion-mnist`, or `hf download {FASHION_HUB} "
            f"--repo-type dataset` on a machine with a network. The hub said: {error}"
        ) from error
    return replace(
        source,
        name="fashion_mnist",
        class_names=prompts.class_names or (),
        templates=prompts.templates,
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An array of bytes in the gzipped IDX format (Y. LeCun, the MNIST files)."""
    try:
        with gzip.open(path, "rb") as file:
            content = file.read()
        zeros, kind, dimensions = struct.unpack(">HBB", content[:4])
        start = 4 + 4 * dimensions
        shape = struct.unpack(f">{dimensions}I", content[4:start])
        if zeros != 0 or kind != 8:
            raise ValueError("not an IDX file of bytes")
        return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise UsageError(f"{path}: damaged or missing ({error}); install it again") from error


def icons(path: str | None = None, layout: str = "auto") -> ImageSource:
    """Concepts drawn by icon families that the embedded model never saw; a family is a site.

    Variants of one drawing are one group, and the test split is the data set's own. `path` may
    name another file of the same form.
    """
    file = Path(path).expanduser() if path else Path(str(files("fedclip"))) / "data/icons/icons.npz"
    if not file.is_file():
        raise UsageError(f"data.name: icons: no such file: {file}; reinstall fedclip")
    with np.load(file, allow_pickle=False) as data:
        return ImageSource(
            name="icons",
            images=ArrayImages(data["images"], "icons"),
            labels=data["label"].astype(np.int64),
            class_names=tuple(str(name) for name in data["class_names"]),
            templates=PROMPTS["icons"].templates,
            is_test=mask_or_none(data["split"] == 1),
            groups=data["drawing"].astype(np.int64),
            sites=data["family"].astype(np.int64),
            site_names=tuple(str(name) for name in data["family_names"]),
        )
