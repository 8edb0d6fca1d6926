"""The larger tables of a report: who has what, which classes are confused, what layers learned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain

from fedclip.reports.closing import number
from fedclip.reports.report.blocks import Block, Cell, Picture, Pictures, Table, Text
from fedclip.reports.report.record import LastPredictions, Layer, Partition

MOST_CLASSES = 20  # with a column of their own
MOST_SITES = 200
_LAYER = re.compile(r"(?:.*\.)?(vision_model|text_model)\..*?layers\.(\d+)\.(?:\w+\.)*(\w+)$")


def gain_cells(before: float | None, after: float | None) -> list[Cell | str]:
    """Two accuracies, and the step from one to the other as a bar between 0 and 1."""
    if before is None or after is None:
        return [number(before), number(after), "-"]
    gain = f"{after - before:+.3f}".replace("-", "\N{MINUS SIGN}")
    bar = Cell(gain, bar=abs(after - before), start=min(before, after), low=after < before)
    return [number(before), number(after), bar]


def division(task: str, partition: Partition) -> Table:
    """Training images of each site, by class where the classes are few."""
    sites = partition.clients[:MOST_SITES]
    names, most = partition.class_names, 1
    by_class = 0 < len(names) <= MOST_CLASSES and all(
        len(site.train.by_class) == len(names) for site in sites
    )
    if by_class:
        most = max([1, *chain.from_iterable(site.train.by_class for site in sites)])
    rows: list[list[Cell | str]] = []
    for site in sites:
        counts = site.train.by_class
        cells: list[Cell | str] = [site.client_id, f"{site.train.num_examples:,}"]
        if by_class:
            cells += [Cell(f"{n:,}" if n else "·", shade=n / most) for n in counts]
        elif counts:
            cells.append(str(sum(n > 0 for n in counts)))
        rows.append(cells)
    columns = ["site", "all", *(names if by_class else ["classes"] if names else [])]
    caption = f"Training images of each site{', ' + task if task else ''}"
    if len(partition.clients) > len(sites):
        caption += f" (the first {len(sites)} of {len(partition.clients)})"
    return Table(caption, columns, rows)


def tested_blocks(task: str, tested: LastPredictions) -> list[Block]:
    """The confusion matrix, or the most frequent mistakes, and some images."""
    names = tested.class_names
    suffix = f", {task}" if task else ""
    blocks: list[Block] = [
        _matrix(tested, suffix) if len(names) <= MOST_CLASSES else _confusions(tested, suffix)
    ]
    if tested.confusion and all(row[0] == row[1] for row in tested.confusion):
        blocks.append(Text(f"No mistakes on the test images{suffix}."))
    for right, words in ((False, "Wrong answers, the surest first"), (True, "Right answers")):
        shown = [
            Picture(one.image, names[one.label], names[one.predicted], f"{one.confidence:.0%}",
                    right, one.place)
            for one in tested.samples
            if (one.label == one.predicted) == right
        ]  # fmt: skip
        if shown:
            told = f"{words}{suffix}: the true class, what was predicted, how surely"
            blocks.append(Pictures(told, shown))
    return blocks


def _matrix(tested: LastPredictions, suffix: str) -> Table:
    names = tested.class_names
    counts = [[0] * len(names) for _ in names]
    for true, predicted, n in tested.confusion:
        counts[true][predicted] = n
    rows: list[list[Cell | str]] = [
        [name, *(Cell(str(n) if n else "·", shade=n / max(1, sum(row))) for n in row)]
        for name, row in zip(names, counts, strict=True)
    ]
    return Table(f"Confusion matrix{suffix}: true classes in rows, predicted ones in columns, "
                 "numbers of images", ["true \\ predicted", *names], rows)  # fmt: skip


def _confusions(tested: LastPredictions, suffix: str) -> Table:
    """The most frequent mistakes, where a matrix would be too large."""
    wrong = sorted((row for row in tested.confusion if row[0] != row[1]), key=lambda row: -row[2])
    names, in_all = tested.class_names, sum(row[2] for row in wrong)
    rows = [[names[true], names[found], str(n)] for true, found, n in wrong[:MOST_CLASSES]]
    caption = f"The most frequent mistakes{suffix}, of {in_all:,} in all"
    return Table(caption, ("true", "predicted", "images"), rows)


def adapter_blocks(layers: Sequence[Layer]) -> list[Block]:
    """Norms and ranks, by tower, layer and module."""
    if not layers:
        return []
    most = max(layer.norm for layer in layers) or 1.0
    table, others = dict[tuple[str, int], dict[str, Layer]](), list[Layer]()
    for layer in layers:
        if found := _LAYER.match(layer.path):
            tower, block, name = found.groups()
            table.setdefault((tower.removesuffix("_model"), int(block)), {})[name] = layer
        else:
            others.append(layer)
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    rows = [
        [f"{tower} {block}", *(_norm(table[tower, block].get(name), most) for name in names)]
        for tower, block in sorted(table, key=lambda key: (key[0] == "text", key[1]))
    ]
    blocks: list[Block] = []
    if rows:
        caption = "Frobenius norm of each layer's update B A, scaled, and its rank"
        blocks.append(Table(caption, ["tower, layer", *names], rows))
    if others:
        named = [[layer.path, _norm(layer, most)] for layer in others]
        blocks.append(Table("Other layers: norm and rank", ("layer", "norm"), named))
    return blocks


def _norm(layer: Layer | None, most: float) -> Cell | str:
    if layer is None:
        return "-"
    return Cell(f"{layer.norm:.3f} (r {layer.rank})", shade=layer.norm / most)
