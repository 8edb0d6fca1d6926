"""What a run has learned, in forms that others read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fedclip.adapters.load import adapter_folder, in_run, run_and_adapter
from fedclip.config.loading import load_config
from fedclip.errors import UsageError
from fedclip.experiment.build import model_seed
from fedclip.experiment.folder import CONFIG, RunFolder
from fedclip.models.adapter_folder import FILES, read_adapter
from fedclip.models.adapter_updates import open_adapter
from fedclip.models.export.onnx import save_onnx
from fedclip.models.export.transformers_folder import save_plain
from fedclip.models.whole_folder import write_folder
from fedclip.models.wrapper import CLIPLoRAWrapper


def export(
    source: str | Path, to: str, output: str | Path | None = None, *, best: bool = False
) -> dict[str, Any]:
    """Writes a run's last adapter, or an adapter folder, as a folder for other programs.

    With `best` it is the run's best one by validation. `to` is "peft" (the adapter itself),
    "merged" (a plain transformers `CLIPModel`) or "onnx" (both towers). `output` is by default
    `<source>-<to>`, or `<source>-best-<to>`. Returns `source`, `to` and `output`. Raises
    `UsageError` for what cannot be had in that form.
    """
    if to not in FORMS:
        raise UsageError(f"--to must be one of {', '.join(FORMS)}, got {to!r}")
    path = Path(source)
    place = path.resolve()
    name = f"{place.name}-best-{to}" if best else f"{place.name}-{to}"
    folder = Path(output) if output is not None else place.with_name(name)
    FORMS[to](path, folder, best)
    return {"source": str(source), "to": to, "output": str(folder)}


def _peft(source: Path, folder: Path, best: bool) -> None:
    adapter = adapter_folder(source, best)
    _, notes, _ = read_adapter(adapter)
    if not notes.kind.peft_format:
        raise UsageError(f"{source} holds {notes.kind.title}, no PEFT adapter; use --to merged")
    found = [adapter / name for name in FILES if (adapter / name).is_file()]

    def write(fresh: Path) -> None:
        for file in found:
            shutil.copyfile(file, fresh / file.name)

    if adapter.resolve() == folder.resolve():
        raise UsageError(f"--output {folder} is the adapter folder itself; name another one")
    write_folder(folder, FILES, write)


def _open(source: Path, best: bool) -> CLIPLoRAWrapper:
    """The model with everything in its weights; a run's configuration tells the base and seed."""
    if not (best or RunFolder(source).is_run() or in_run(source)):
        return open_adapter(source)
    run, adapter = run_and_adapter(source, best)
    config = load_config(run.path / CONFIG)
    return open_adapter(adapter, base_model=config.model.model_name, seed=model_seed(config))


FORMS = {
    "peft": _peft,
    "merged": lambda source, folder, best: save_plain(_open(source, best), folder),
    "onnx": lambda source, folder, best: save_onnx(_open(source, best), folder),
}
