"""The adapters that a run ends with, as PEFT folders."""

from __future__ import annotations

from urllib.parse import quote

from fedclip.parts import Parts
from fedclip.records import RunState
from fedclip.runs import RunFolder


def save_adapters(parts: Parts, state: RunState, folder: RunFolder, name: str) -> None:
    """Writes the shared adapter to `name`, and those of the clients' own beside it.

    A client's is `<name>_of/<client id>`.
    """
    parts.put(state)
    with folder.writing(name) as path:
        parts.model.save_adapter(path)
    for client_id, own in state.private.items():
        if own.keys() & state.shared.keys():
            parts.model.set_parameters(state.of(client_id))
            with folder.writing(f"{name}_of/{quote(client_id, '')}") as path:
                path.parent.mkdir(exist_ok=True)
                parts.model.save_adapter(path)
    parts.put(state)
