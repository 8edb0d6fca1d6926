"""The sections of one run's report."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from fedclip.reports.closing import number
from fedclip.reports.progress import duration
from fedclip.reports.report import charts
from fedclip.reports.report.blocks import (
    Block,
    Charts,
    Facts,
    Section,
    Table,
    Text,
)
from fedclip.reports.report.page import page
from fedclip.reports.report.record import RunRecord, Summary
from fedclip.reports.report.tables import (
    MOST_SITES,
    adapter_blocks,
    division,
    gain_cells,
    tested_blocks,
)
from fedclip.reports.share import few, interval_of, none_is_worse
from fedclip.reports.tables import retrieval_rows


def run_page(run: RunRecord) -> str:
    """The page of one run."""
    return page(f"Report of {run.name}", about(run), run_sections(run))


def about(run: RunRecord) -> str:
    """What was run, in one line."""
    config = run.config
    done = run.rounds[-1].server_round
    total = config["federation"]["rounds"]
    state = f"{done} rounds" if run.summary else f"{done} of {total} rounds so far"
    reason = run.summary.stopped_by if run.summary else None
    early = f", ended early: {reason}" if reason else ""
    attack = config.get("attack") or {}
    hostile = ""
    if attack.get("name", "none") != "none":
        hostile = f", {attack.get('clients')} hostile clients ({attack.get('name')})"
    return (
        f"model {_short(config['model']['model_name'])} on {_data(config)}, "
        f"strategy {config['federation']['strategy']}, {state}{early}{hostile}"
    )


def _data(config: Mapping[str, Any]) -> str:
    """The tasks, or the data set with its folder's name or its address in the hub."""
    name, path = config["data"]["name"], config["data"].get("path")
    return ", ".join(config["tasks"]) or (f"{_short(path)} ({name})" if path else name)


def _short(name: str) -> str:
    """The last part of a path of this machine; another name as it is."""
    return Path(name).name if Path(name).is_absolute() else name


def run_sections(run: RunRecord) -> list[Section]:
    """All sections; empty where the run has nothing for them."""
    return [
        Section("Results", [Facts(results(run), "tiles"), *_little(run), *_retrieval(run)]),
        Section("Rounds", _rounds(run)),
        Section("Sites", _sites(run)),
        Section("Predictions on the test set", _tested(run)),
        Section("Adapter", adapter_blocks(run.layers)),
        Section("Privacy and updates left out", _trust(run)),
        Section("Traffic and time", _cost(run)),
        Section("What was run", _what(run)),
    ]


def results(run: RunRecord) -> list[tuple[str, str]]:
    """The figures that a run ends with."""
    scored = [line for line in run.rounds if line.accuracy is not None]
    before, found = zero_shot(run), run.summary
    what = "image-to-text recall@1" if captioned(run) else "accuracy"
    pairs = []
    if scored:
        last = scored[-1].accuracy
        assert last is not None
        pairs = [(what, number(last))]
        if interval := interval_of(last, scored[-1].test_examples, tasks=bool(run.config["tasks"])):
            pairs.append(("95 % interval", f"{interval} ({scored[-1].test_examples:,} images)"))
        pairs.append(("zero-shot", number(before)))
        if before is not None:
            pairs.append(("gain", f"{last - before:+.3f}"))
        if spread := scored[-1].client_accuracy:
            pairs.append(("sites, lowest to highest", f"{spread.min:.2f} to {spread.max:.2f}"))
    if found is None:
        return pairs
    if found.best:
        pairs += [
            ("best round by validation", f"round {found.best.server_round}"),
            (f"validation {what} of that round", number(found.best.validation_accuracy)),
            (f"test {what} of that round", number(found.best.accuracy)),
        ]
    if found.worst_class:
        pairs += [("recall of the worst class", _worst(found)),
                  ("macro-F1", number(found.macro_f1))]  # fmt: skip
        pairs.append(("always the commonest class", number(found.majority_class_rate)))
    pairs.append(("a site sends a round", f"{found.bytes_up_per_client_round / 1e6:.2f} MB"))
    if found.seconds is not None:
        pairs.append(("time", duration(found.seconds)))
    return pairs


def _worst(found: Summary) -> str:
    """The lowest recall of a class, with the class's name if others do better."""
    assert found.worst_class is not None
    name, recall = found.worst_class.name, found.worst_class.recall
    if none_is_worse(recall, found.accuracy):
        return f"{number(recall)} (of every class)"
    return f"{number(recall)} ({name if len(name) < 25 else name[:23] + '…'})"


def _little(run: RunRecord) -> list[Text]:
    """That the test images are few, where they are."""
    told = few(next((n for line in reversed(run.rounds) if (n := line.test_examples)), None))
    return [Text(f"{told[0].upper()}{told[1:]}.")] if told else []


def zero_shot(run: RunRecord) -> float | None:
    """The base model's accuracy."""
    return run.rounds[0].zero_shot_accuracy


def captioned(run: RunRecord) -> bool:
    """Whether the run learned from captions."""
    return bool(run.config["task"] == "contrastive")


def before_by_site(run: RunRecord) -> dict[str, float | None]:
    """Each site's accuracy before training."""
    return run.rounds[0].accuracy_by_client


def last_by_site(run: RunRecord) -> dict[str, float | None]:
    """Each site's last accuracy."""
    told = [line.accuracy_by_client for line in run.rounds if line.accuracy_by_client]
    return told[-1] if told else {}


def _retrieval(run: RunRecord) -> list[Block]:
    rows = retrieval_rows(run.summary.model_dump()) if run.summary else []
    cells = [[row["recall"], number(row["zero_shot"]), number(row["trained"])] for row in rows]
    return (
        [Table("Recalls on the test set", ("recall", "zero-shot", "trained"), cells)]
        if rows
        else []
    )


def _rounds(run: RunRecord) -> list[Block]:
    drawn = [charts.accuracy_chart(run.rounds, zero_shot(run)), charts.loss_chart(run.rounds)]
    has = [any(line.accuracy is not None for line in run.rounds)]
    has.append(any(v is not None for line in run.rounds for v in (line.loss, line.test_loss)))
    shown = [chart for chart, there in zip(drawn, has, strict=True) if there]
    return [Charts(shown)] if shown else []


def _sites(run: RunRecord) -> list[Block]:
    before, after = before_by_site(run), last_by_site(run)
    own = "its own model" if run.summary and run.summary.personal else "the shared model"
    blocks: list[Block] = []
    if any(value is not None for value in after.values()):
        rows = [
            [site, *gain_cells(before.get(site), value)]
            for site, value in list(after.items())[:MOST_SITES]
        ]
        first = run.rounds[0]  # of a linear head, not what CLIP does by itself
        same = first.zero_shot_accuracy == first.accuracy
        start = "zero-shot" if same else "before training"
        caption = f"Accuracy of {own} on each site's own test images"
        blocks.append(Table(caption, ("site", start, "trained", "gain"), rows))
    for task, partition in run.partitions.items():
        blocks.append(division(task, partition))
    return blocks


def _tested(run: RunRecord) -> list[Block]:
    if not run.tested:
        missing = run.summary is not None and not captioned(run) and not _private(run)
        told = "This run kept no predictions; fedclip evaluate RUN --plots DIR draws them anew."
        return [Text(told)] if missing else []
    return list(chain.from_iterable(tested_blocks(task, own) for task, own in run.tested.items()))


def _private(run: RunRecord) -> bool:
    return run.config["privacy"]["unit"] is not None


def _trust(run: RunRecord) -> list[Block]:
    blocks: list[Block] = []
    spent = [(line.server_round, line.epsilon) for line in run.rounds if line.epsilon is not None]
    found = run.summary.privacy if run.summary else None
    if found:
        promise = f"epsilon {found.epsilon:.3g}, delta {found.delta:.3g}"
        pairs = [("protected", f"each {found.unit}"), ("clipping norm", f"{found.clip_norm:g}")]
        told = promise if found.guarantee else f"{promise}; reproducible: no guarantee"
        blocks.append(Facts([("spent", told), *pairs]))
    if spent:
        blocks.append(Charts([charts.lines_chart("Epsilon spent by round", "epsilon",
                                                 {"epsilon": spent})]))  # fmt: skip
    rows = [
        [one.client, str(line.server_round), one.reason]
        for line in run.rounds
        for one in line.left_out
    ]
    if rows:
        more = f" (the first {MOST_SITES} of {len(rows)})" if len(rows) > MOST_SITES else ""
        caption = f"Updates left out{more}"
        blocks.append(Table(caption, ("site", "round", "why"), rows[:MOST_SITES]))
    return blocks


def _cost(run: RunRecord) -> list[Block]:
    up = sum(line.bytes_up for line in run.rounds)
    down = sum(line.bytes_down for line in run.rounds)
    pairs = [("sent by sites, in all", f"{up / 1e6:,.1f} MB"),
             ("received by sites, in all", f"{down / 1e6:,.1f} MB")]  # fmt: skip
    if run.summary:
        own = run.summary
        pairs += [
            ("a site sends a round", f"{own.bytes_up_per_client_round / 1e6:,.3f} MB"),
            ("a site receives a round", f"{own.bytes_down_per_client_round / 1e6:,.3f} MB"),
        ]
        if own.base_parameters:
            whole = own.base_parameters * 4 / 1e6
            pairs.append(("the whole model would be, each way", f"{whole:,.1f} MB"))
    blocks: list[Block] = [Facts(pairs)]
    if run.times:
        first, later = run.times[0], run.times[1:]
        training = sum(min(line.training_seconds, line.seconds) for line in later)
        rest = sum(line.seconds for line in later) - training
        spent = [("loading and first test", first.seconds), ("training", training),
                 ("combining, testing, saving", rest)]  # fmt: skip
        blocks.append(Facts([(name, f"{seconds:,.1f} s") for name, seconds in spent]))
        blocks.append(Charts([charts.time_chart(run.times)]))
    return blocks


def _what(run: RunRecord) -> list[Block]:
    config, own = run.config, run.summary
    lora, client = config["model"]["lora"], config["client"]
    pairs: list[tuple[str, Any]] = [
        ("model", config["model"]["model_name"]),
        ("data", _data(config)),
        ("strategy", config["federation"]["strategy"]),
        ("LoRA rank, alpha", f"{lora['r']}, {lora['lora_alpha']}"),
        ("local epochs", client["local_epochs"]),
        ("learning rate", client["learning_rate"]),
        ("batch size", config["data"]["batch_size"]),
        ("seed", config["seed"]),
    ]
    if own:
        pairs += [
            ("trained parameters", f"{own.trainable_parameters:,}"),
            ("engine", own.engine),
            ("device, precision", f"{own.device or '-'}, {own.precision}"),
            ("unreadable images", own.bad_images),
        ]
        pairs += [(f"version of {name}", text) for name, text in own.versions.items()]
    facts = Facts([(name, str(value)) for name, value in pairs])
    return [facts, Text(run.config_text, title="The whole configuration")]
