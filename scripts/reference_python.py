"""The reference page of the Python interface: signatures and docstrings of what is public."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

HEAD = """\
# Python reference

<!-- Made by scripts/reference.py from the docstrings in src/fedclip; edit there. -->

What is named here is public. `import fedclip` loads no torch; the names load what they need when
they are first used. Mistakes that a user can mend raise `fedclip.UsageError` with a message that
says how; advice comes as `fedclip.errors.FedclipWarning`. [Errors](reference-commands.md#errors)
and the keys of a [configuration](reference-configuration.md) have pages of their own;
[how to work from Python](how-to-python.md) has examples.
"""

# By heading, module and names.
PUBLIC: dict[str, dict[str, tuple[str, ...]]] = {
    "Runs": {
        "fedclip": ("run", "resume", "Run", "Listener", "load_config", "Config"),
        "fedclip.reports.trackers": ("Tracker",),
    },
    "Asking about runs": {
        "fedclip": ("info", "evaluate", "predict", "load_run_model"),
        "fedclip.adapters.predict": ("Predictor", "predictions"),
        "fedclip.adapters.card": ("run_card",),
        "fedclip.adapters.serve.app": ("create_app",),
    },
    "Making something new of adapters": {
        "fedclip": ("export", "merge"),
        "fedclip.adapters.merge_search": ("Validation",),
        "fedclip.lora.rank_budget": ("allocate",),
        "fedclip.lora.names": ("factor_names",),
        "fedclip.models.adapter_updates": ("read_lora",),
    },
    "Models": {
        "fedclip": ("create_clip_model", "open_adapter", "base_folder", "CLIPLoRAWrapper"),
    },
    "Strategies and their records": {
        "fedclip": ("Strategy",),
        "fedclip.federated.strategies": ("create_strategy",),
        "fedclip.federated.strategies.base": ("guarded",),
        "fedclip.federated.updates": ("Updates", "Guarded"),
        "fedclip.records": ("RunState", "TrainRequest", "Cohort", "ClientReport"),
        "fedclip.federated.traffic": ("Layer", "bytes_per_round"),
    },
    "Training by hand": {
        "fedclip.federated.client": ("local_train",),
        "fedclip.federated.local_steps": ("LocalSettings",),
    },
}


# Classes that users make; all others they are given.
MADE = ("Cohort", "Layer", "LocalSettings", "RunState", "TrainRequest")


def page() -> str:
    """The whole page as Markdown."""
    lines = [HEAD]
    for heading, modules in PUBLIC.items():
        lines.append(f"## {heading}\n")
        for module, names in modules.items():
            for name in names:
                lines += _section(module, name, getattr(import_module(module), name))
    return "\n".join(lines).rstrip() + "\n"


def _section(module: str, name: str, found: Any) -> Iterator[str]:
    made = not inspect.isclass(found) or name in MADE
    called = f"\n{name}{_typed(inspect.signature(found))}" if made else ""
    yield f"### `{name}`\n\n```text\nfrom {module} import {name}{called}\n```\n"
    yield f"{inspect.cleandoc(found.__doc__ or '')}\n"
    rows = list(_members(found))
    if rows and name != "Config":
        yield "| member | meaning |\n|---|---|"
        yield from rows
        yield ""


def _given(signature: inspect.Signature) -> list[inspect.Parameter]:
    return [p for p in signature.parameters.values() if not re.match("self$|cls$|_", p.name)]


def _words(signature: inspect.Signature, kinds: bool) -> list[str]:
    """Arguments with defaults, and with `kinds` as annotated."""
    words = []
    for parameter in _given(signature):
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        kind = getattr(parameter.annotation, "__forward_arg__", parameter.annotation)
        text = f"{parameter.name}: {kind}" if kinds else parameter.name
        if parameter.default is not parameter.empty:
            text += f"{' = ' if kinds else '='}{_shown(parameter.default)}"
        words.append(text)
    return words


def _typed(signature: inspect.Signature) -> str:
    """Arguments as annotated, and what comes back; one a line where they are many."""
    words = _words(signature, kinds=True)
    returned = signature.return_annotation
    after = "" if returned in (signature.empty, None, "None") else f" -> {returned}"
    text = f"({', '.join(words)}){after}"
    return text if len(text) <= 80 else "(\n    " + ",\n    ".join(words) + f",\n){after}"


def _shown(value: Any) -> str:
    """A default as code would write it."""
    if callable(value):
        return str(getattr(value, "__name__", "...")).replace("<lambda>", "...")
    return "..." if "<" in repr(value) else repr(value)


def _members(found: Any) -> Iterator[str]:
    """Public methods and properties with docstrings, also of bases in fedclip."""
    seen: set[str] = set()
    for home in found.__mro__ if inspect.isclass(found) else ():
        for name, member in vars(home).items() if home.__module__.startswith("fedclip") else ():
            inner = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if name.startswith("_") or name in seen or not inspect.isfunction(inner):
                continue
            seen.add(name)
            told = " ".join((inner.__doc__ or "").split())
            words = ", ".join(_words(inspect.signature(inner), kinds=False))
            if told:
                yield _row(name if isinstance(member, property) else f"{name}({words})", told)


def _row(name: str, told: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{name}`", told)) + " |"
