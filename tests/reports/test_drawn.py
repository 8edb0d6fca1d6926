"""Pictures are the same bytes whenever they are drawn."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from fedclip.reports.curves import drawn


@pytest.mark.parametrize("form", ["svg", "png"])
def test_a_figure_is_drawn_to_the_same_bytes(form: str) -> None:
    def one() -> bytes:
        figure = Figure()
        figure.subplots().errorbar([1, 2], [3, 4], yerr=[0.1, 0.2], fmt="o", capsize=3)
        return drawn(figure, form)

    assert one() == one()
    assert form == "png" or b"<dc:date>" not in one()
