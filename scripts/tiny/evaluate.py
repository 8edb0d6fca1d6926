"""Zero-shot evaluation: classes are named in prompts, and no picture of them is trained on."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel

from fedclip.data.prompts import PROMPTS
from fedclip.data.sources.builtin import FASHION_FOLDER as FASHION

from .model import IMAGE_SIZE

DATA_SETS = ("digits", "icons", "fashion_mnist")
TEMPLATES = {name: PROMPTS[name].templates for name in DATA_SETS}


def pixels(images: np.ndarray) -> Tensor:
    """Grey uint8 images [n, h, w] as the saved image processor gives them: bicubic, to [-1, 1]."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    resized = [
        np.asarray(Image.fromarray(i).convert("RGB").resize(size, Image.Resampling.BICUBIC))
        for i in images
    ]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 127.5 - 1


def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, light on dark as they come."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.round(data.images * (255 / 16)).astype(np.uint8), data.target


def icons_test(folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The test split of the `icons` data set and its class names."""
    with np.load(folder / "icons.npz", allow_pickle=False) as data:
        test = data["split"] == 1
        return data["images"][test], data["label"][test], data["class_names"].tolist()


def fashion_test(folder: Path = FASHION) -> tuple[np.ndarray, np.ndarray]:
    """The 10,000 test images of Fashion-MNIST, from the files of Debian's package."""
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as stream:
        images = np.frombuffer(stream.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as stream:
        labels = np.frombuffer(stream.read(), np.uint8, offset=8)
    return images, labels


def class_embeddings(model: CLIPModel, tokenizer, names, templates) -> Tensor:
    """One unit vector a class: the mean over its templates."""
    texts = [t.format(n) for n in names for t in templates]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    vectors = model.text_projection(model.text_model(**inputs).pooler_output)
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    return torch.nn.functional.normalize(
        vectors.view(len(names), -1, vectors.shape[-1]).mean(1), dim=-1
    )


@torch.no_grad()
def predict(model: CLIPModel, tokenizer, images: Tensor, names, templates) -> Tensor:
    """The class of each picture by its nearest prompt."""
    classes = class_embeddings(model, tokenizer, names, templates)
    chosen = []
    for part in images.split(512):
        vectors = model.visual_projection(model.vision_model(part).pooler_output)
        chosen.append((vectors @ classes.T).argmax(-1))
    return torch.cat(chosen)


def accuracy(model, tokenizer, images: Tensor, labels, names, templates) -> float:
    """The share of pictures whose nearest prompt is right."""
    chosen = predict(model, tokenizer, images, names, templates)
    return float((chosen == torch.tensor(np.asarray(labels).tolist())).float().mean())


class Suite:
    """The three zero-shot figures, with the pictures prepared once."""

    def __init__(self, icons: Path, fashion: Path = FASHION, limit: int | None = None) -> None:
        images, labels = digits()
        self.sets = {"digits": (pixels(images), labels, PROMPTS["digits"].class_names)}
        images, labels, names = icons_test(icons)
        self.sets["icons"] = (pixels(images), labels, names)
        if (fashion / "t10k-images-idx3-ubyte.gz").exists():
            images, labels = fashion_test(fashion)
            part = slice(0, limit)
            names = PROMPTS["fashion_mnist"].class_names
            self.sets["fashion_mnist"] = (pixels(images[part]), labels[part], names)

    def __call__(self, model: CLIPModel, tokenizer) -> dict[str, float]:
        """The accuracy of a model on each set."""
        model.eval()
        return {
            name: round(accuracy(model, tokenizer, *data, TEMPLATES[name]), 4)
            for name, data in self.sets.items()
        }
