"""The model card of a finished run, in the hub's format: what was trained, how, and how well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fedclip.adapters.card_figures import accuracies, recalls, whose
from fedclip.adapters.load import finished, public_name, run_and_adapter, summary_of
from fedclip.catalog import short_name
from fedclip.config import Config
from fedclip.config.loading import load_config
from fedclip.errors import UsageError
from fedclip.experiment.folder import CONFIG, PARTITION
from fedclip.experiment.summary import FLOWER
from fedclip.models.adapter_card import code, loading, markdown
from fedclip.models.adapter_folder import read_adapter
from fedclip.models.adapter_notes import AdapterNotes
from fedclip.models.pretrained import EMBEDDED, RANDOM
from fedclip.reports.closing import number


def run_card(folder: str | Path, repo_id: str | None = None, *, best: bool = False) -> str:
    """The card of a run's last adapter, as Markdown with the hub's front matter.

    With `best` it is that of the best round by validation, with the figures of that round.
    It names neither clients nor folders of this machine. `repo_id` is where readers will find the
    adapter; None leaves a gap for a folder.
    """
    run = finished(folder)
    config = load_config(run.path / CONFIG)
    if config.tasks:
        raise UsageError(
            f"{folder} has several tasks, and a card is of a run on one; the README.md of each "
            "adapter in it (adapter/, adapter_of/) says what that one is"
        )
    summary = summary_of(run, best)
    _, notes, _ = read_adapter(run_and_adapter(run.path, best)[1])
    kind = notes.kind
    base = public_name(config.model.model_name)
    name = repo_id or f"clip-{_data_name(config)}-{short_name(summary['strategy'])}"
    card = ModelCardData(
        base_model=base if _on_the_hub(config.model.model_name) else None,
        library_name="peft" if kind.peft_format else "fedclip",
        tags=["clip", "federated-learning", "fedclip", *(["lora"] if kind.peft_format else [])],
        datasets=[_data_name(config)] if _hub_data(config) else None,
        metrics=["recall" if config.task == "contrastive" else "accuracy"],
        model_name=name.split("/")[-1],
        pipeline_tag="zero-shot-image-classification" if notes.head == "text" else None,
        eval_results=_results(config, summary),
    )
    body = [
        f"# {name.split('/')[-1]}",
        f"{kind.title[0].upper()}{kind.title[1:]} for CLIP (`{base}`), trained "
        f"with fedclip {_origin(summary)}",
        *_section("Results", [*accuracies(summary), *recalls(summary), *whose(run.path, summary)]),
        *_section(
            "Data",
            [*_data(config, summary, run.read_json(PARTITION), notes), *_sizes(summary)],
        ),
        *_section("Training", [*_best(config, summary, best), *_training(config, summary)]),
        *_section("Traffic", _traffic(summary)),
        "## How to load",
        "\n".join(
            loading(
                kind,
                base,
                head=notes.head,
                place=repo_id or "<this folder>",
            )
        ),
        *_section("Privacy", _privacy(summary)),
        *_section("Limits", _limits(notes)),
    ]
    return str(ModelCard(f"---\n{card.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"))


def _origin(summary: Mapping[str, Any]) -> str:
    """Where the images were, and what was simulated."""
    if not _simulated(summary):
        return (
            "in a federation of sites on machines of their own: they exchanged parameters, never "
            "images."
        )
    if summary["strategy"] == "centralised":
        return "on the images of all clients together, by one program: there was no federation."
    return (
        "in a simulated federation: one program read the images of all clients and trained for "
        "each on its own part. The training is real; that clients are apart, and what travels "
        "between them, is simulated."
    )


def _simulated(summary: Mapping[str, Any]) -> bool:
    return summary["engine"] != FLOWER


def _on_the_hub(model_name: str) -> bool:
    local = model_name in EMBEDDED or model_name.startswith(RANDOM)
    return not local and not Path(model_name).is_absolute()


def _hub_data(config: Config) -> bool:
    data = config.data
    return data.name == "hub" and data.path is not None and not Path(data.path).is_absolute()


def _data_name(config: Config) -> str:
    if _hub_data(config):
        return str(config.data.path).partition("?")[0]  # options follow a question mark
    return short_name(config.data.name)


def _results(config: Config, summary: Mapping[str, Any]) -> list[EvalResult]:
    data = _data_name(config)
    captions = config.task == "contrastive"
    what = "image-to-text recall@1" if captions else "accuracy"
    values = {
        f"{what} on the central test set": summary["accuracy"],
        f"lowest {what} of a client": (summary["client_accuracy"] or {}).get("min"),
    }
    return [
        EvalResult(
            task_type="image-to-text" if captions else "image-classification",
            dataset_type=data,
            dataset_name=data,
            metric_type="recall" if captions else "accuracy",
            metric_name=name,
            metric_value=value,
        )
        for name, value in values.items()
        if value is not None
    ]


def _data(
    config: Config, summary: Mapping[str, Any], partition: Mapping[str, Any], notes: AdapterNotes
) -> list[str]:
    sizes = [client["train"]["num_examples"] for client in partition["clients"]]
    words = [f"- {partition['test']['num_examples']:,} test examples."]
    if _simulated(summary):
        words = [
            f"- Data set: {_data_name(config)}, divided by `{partition['partition']['name']}`.",
            f"- {len(sizes)} clients with {min(sizes):,} to {max(sizes):,} training examples each "
            f"(median {median(sizes):,.0f}, {sum(sizes):,} in all).",
            *words,
        ]
    else:
        words = [
            f"- Images of {summary['clients']} sites, which stayed there.",
            words[0].replace(".", " of the coordinator's."),
        ]
    classes = f"- {len(notes.class_names)} classes: {', '.join(map(markdown, notes.class_names))}."
    prompts = "- Prompts: " + ", ".join(map(code, notes.templates)) + "."
    return [
        *words,
        *([classes] if notes.class_names else []),
        *([prompts] if notes.templates else []),
    ]


def _sizes(summary: Mapping[str, Any]) -> list[str]:
    """The model's input and how much it shrinks the images; nothing of an older run."""
    edge, factor = summary.get("input_size"), summary.get("shrunk")
    if edge is None:
        return []
    seen = f"- The model sees {edge} x {edge} pixels"
    if factor is None or factor <= 1:
        return [f"{seen}."]
    return [f"{seen}: the images, by their median shorter side, shrunk {factor:.2g}-fold."]


def _best(config: Config, summary: Mapping[str, Any], best: bool) -> list[str]:
    """Which round's adapter it is, where it is not the last one's."""
    if not best:
        return []
    accuracy = number(summary["validation_accuracy"])
    return [
        f"- The adapter is that of round {summary['rounds']} (of {config.federation.rounds} that "
        f"were asked for), the best by validation accuracy ({accuracy})."
    ]


def _training(config: Config, summary: Mapping[str, Any]) -> list[str]:
    lora, trains = config.model.lora, config.model.trains
    towers = {"full": "all weights", "head": "the linear head alone"}.get(
        trains, f"rank {lora.r}, alpha {lora.lora_alpha:g}"
    )
    return [
        f"- Strategy `{short_name(summary['strategy'])}`, {summary['rounds']} rounds, "
        f"{summary['clients_per_round']} of {summary['clients']} clients in each.",
        *_hostile(summary),
        f"- {towers}: {summary['trainable_parameters']:,} trained parameters of "
        f"{summary['total_parameters']:,}.",
        f"- Learning rate {config.optimizer.learning_rate:g}, {config.client.local_epochs} local "
        f"epochs, batches of {config.data.batch_size}, seed {summary['seed']}, "
        f"{summary['precision']}.",
        "- Versions: " + ", ".join(f"{k} {v}" for k, v in summary["versions"].items()) + ".",
    ]


def _hostile(summary: Mapping[str, Any]) -> list[str]:
    """That clients of an experiment attacked it."""
    attack = summary.get("attack")
    if not attack or not attack["clients"]:
        return []
    strength = "" if attack["strength"] is None else f", strength {attack['strength']:g}"
    return [
        f"- **An experiment**: {len(attack['clients'])} of its clients were hostile on purpose "
        f"(`{attack['name']}`{strength}). Not for use."
    ]


def _traffic(summary: Mapping[str, Any]) -> list[str]:
    up, down = (summary[f"bytes_{way}_per_client_round"] for way in ("up", "down"))
    all_bytes = (up + down) * summary["rounds"] * summary["clients_per_round"]
    how = "Counted, not sent: a client would send" if _simulated(summary) else "A client sent"
    received = "receive" if _simulated(summary) else "received"
    return [
        f"{how} {up / 1e6:.3f} MB and {received} {down / 1e6:.3f} MB in a round; "
        f"all of them together {all_bytes / 1e6:.1f} MB."
    ]


def _privacy(summary: Mapping[str, Any]) -> list[str]:
    """What is promised, or that nothing is."""
    promise = summary.get("privacy")
    if promise is None:
        return [
            "Parameters that are exchanged can tell something about the training images: federated "
            "training alone is no guarantee of privacy."
        ]
    if not promise["guarantee"]:
        return [
            "**No guarantee of privacy**: noise was drawn from the run's seed "
            "(`privacy.reproducible`), by which it can be taken away."
        ]
    whom = {"example": "any one training image", "client": "all images of any one client"}
    return [
        f"Differentially private in {whom[promise['unit']]}, added or removed: epsilon "
        f"{promise['epsilon']:.3g} at delta {promise['delta']:g} (numerical composition; by Renyi "
        f"divergence {promise['epsilon_rdp']:.3g}), noise multiplier "
        f"{promise['noise_multiplier'][0]:.3g} to {promise['noise_multiplier'][1]:.3g}, clipped to "
        f"{promise['clip_norm']:g}. The figures above are of test images, which the promise does "
        "not speak of.",
    ]


def _limits(notes: AdapterNotes) -> list[str]:
    head = (
        "- Other class names may be asked for, but what was not trained was not measured either."
        if notes.head == "text"
        else "- The head knows the classes above and no others."
    )
    return [
        "- Measured on the data above only; other cameras or sites may give other figures.",
        head,
        "- The licences of the base model and of the data hold for what was made of them.",
    ]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(lines)]
