"""The picture of docs/explanation-federated-lora.md: the mean of B A is not mean B times mean A.

python scripts/mean_of_products.py      writes docs/images/mean-of-products.svg
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "mean-of-products.svg"
# Two clients of equal weight, rank 1: B is [clients, out, r], A is [clients, r, in].
B = np.array([[[1.0], [0.0]], [[0.0], [1.0]]])
A = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])


def panels() -> dict[str, np.ndarray]:
    """What is shown, by its title."""
    learned = B @ A
    mean, used = learned.mean(0), B.mean(0) @ A.mean(0)
    return {
        "client 1: B₁A₁": learned[0],
        "client 2: B₂A₂": learned[1],
        "mean of B A": mean,
        "mean B · mean A": used,
        "what is lost": mean - used,
    }


def main() -> None:
    """Draw the matrices side by side, with their numbers."""
    mpl.rcParams["svg.hashsalt"] = "fedclip"
    mpl.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(9, 2.3), layout="constrained", facecolor="white")
    axes = figure.subplots(1, 5)
    for axis, (title, matrix) in zip(axes, panels().items(), strict=True):
        axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
        axis.set_title(title, fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
        for (row, column), value in np.ndenumerate(matrix):
            dark = abs(value) > 0.6
            colour = "white" if dark else "black"
            axis.text(column, row, f"{value:g}", ha="center", va="center", color=colour)
    for axis, sign in zip(axes[2:4], "=+", strict=True):
        axis.text(1.13, 0.5, sign, transform=axis.transAxes, ha="center", va="center", fontsize=14)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
