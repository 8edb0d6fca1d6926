"""A figure that a notebook shows by itself, whether or not it has set matplotlib up."""

from __future__ import annotations

from matplotlib.figure import Figure

from fedclip.reports.curves import png


class NotebookFigure(Figure):
    """A figure with IPython's method for showing an object as a PNG."""

    def _repr_png_(self) -> bytes:
        return png(self)
