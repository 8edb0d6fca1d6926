"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedclip.reports.text import plain

_WIDEST = 12


def retrieval_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each recall of a run's summary, before and after; none where it has no captions."""
    after, before = summary.get("retrieval"), summary.get("zero_shot_retrieval")
    if after is None or before is None:
        return []
    return [
        {
            "recall": f"{way} {name}".replace("recall_at_", "@").replace("_", " "),
            "zero_shot": before[way][name],
            "trained": value,
        }
        for way, recalls in after.items()
        for name, value in recalls.items()
    ]


def partition_table(class_names: Sequence[str], counts: Mapping[str, Sequence[int]]) -> Table:
    """Training examples per client (rows) and class (columns).

    With more classes than fit on a line, the columns are the number of classes present and the
    sizes of the largest and smallest of them.
    """
    table = Table(
        title="training examples", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("client", no_wrap=True)
    many = len(class_names) > _WIDEST
    columns = ["classes", "largest", "smallest"] if many else list(class_names)
    for column in [*columns, "all"]:
        table.add_column(plain(column), justify="right", overflow="ellipsis", no_wrap=True)
    for client_id, row in counts.items():
        present = [n for n in row if n] or [0]
        cells = [sum(n > 0 for n in row), max(present), min(present)] if many else list(row)
        table.add_row(plain(client_id), *(str(n) if n else "." for n in cells), str(sum(row)))
    return table
