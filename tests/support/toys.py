"""A model small enough to work out by hand: logistic regression on the mean of each channel."""

import numpy as np
import torch

CPU = torch.device("cpu")


class Toy(torch.nn.Module):
    """Logits = W x + b, where x holds the three channel means; float64 on request."""

    def __init__(self, classes: int = 2, dtype: torch.dtype = torch.float64, dropout: float = 0.0):
        super().__init__()
        self.linear = torch.nn.Linear(3, classes, dtype=dtype)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)
        self.dropout = dropout
        self.key: int | None = None

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = pixels.to(self.linear.weight).mean(dim=(2, 3)) / 255
        if self.dropout and self.training and self.key is not None:
            generator = torch.Generator().manual_seed(self.key)
            x = x * (torch.rand(x.shape, generator=generator) > self.dropout)
        return self.linear(x)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return dict(sorted(self.named_parameters()))

    def set_dropout_key(self, key: int | None) -> None:
        self.key = key


def toy_data(n: int, seed: int = 0, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Images `[n, 3, 4, 4]` whose channels say something of the label, and labels `[n]`."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, size=n)
    pixels = rng.integers(0, 128, size=(n, 3, 4, 4), dtype=np.uint8)
    pixels[np.arange(n), labels] += 100
    return pixels, labels.astype(np.int64)
