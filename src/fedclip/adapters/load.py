"""A finished run's model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from fedclip.catalog import in_file
from fedclip.config import Config
from fedclip.config.loading import load_config
from fedclip.errors import FedclipWarning, UsageError
from fedclip.experiment.build import model_config, model_seed
from fedclip.experiment.folder import CONFIG, SUMMARY, RunFolder
from fedclip.experiment.summary import as_of_best
from fedclip.experiment.summary_file import read_summary
from fedclip.files import read_json
from fedclip.models.adapter_folder import CONFIG as PEFT_CONFIG
from fedclip.models.adapter_folder import NOTES, read_adapter
from fedclip.models.adapter_updates import open_adapter
from fedclip.models.clip import CLIPLoRAWrapper, create_clip_model
from fedclip.models.export.transformers_folder import CLASSES, open_plain

_LAST, _BEST = "adapter", "adapter_best"


def finished(folder: str | Path) -> RunFolder:
    """The folder of a run that came to its end; UsageError for any other."""
    around = in_run(folder)
    if around is not None:
        raise UsageError(f"{folder} is an adapter of the run {around}; name that run")
    run_folder = RunFolder.open(folder)
    if not run_folder.is_finished():
        raise UsageError(
            f"{folder}: this run is not finished; go on with it by `fedclip run --resume {folder}`"
        )
    return run_folder


def run_and_adapter(path: str | Path, best: bool = False) -> tuple[RunFolder, Path]:
    """A finished run and one of its adapters: the run's folder means the last round's.

    With `best` it means that of the best round by validation; UsageError where none was kept. A
    path inside the run, such as `RUN/adapter_of/digits`, means that adapter.
    """
    around = in_run(path)
    run = finished(around or path)
    if best and around:
        raise UsageError(
            f"{path} is one adapter of a run; --best (best=True) is for the run's folder, {around}"
        )
    if best and not (run.path / _BEST).is_dir():
        kept = read_summary(run).get("best")
        raise UsageError(
            f"{run.path} has lost its folder {_BEST}; put it back"
            if kept
            else f"{run.path} has kept no best round, so leave out --best (best=True); "
            "evaluation.keep_best: true keeps it in a new run"
        )
    adapter = Path(path) if around else Path(path) / (_BEST if best else _LAST)
    _check_belongs(run, adapter)
    return run, adapter


def summary_of(run: RunFolder, best: bool = False) -> dict[str, Any]:
    """A finished run's summary; with `best` as if it had ended with its best round."""
    summary = read_summary(run)
    if not best:
        return summary
    run_and_adapter(run.path, best)  # is there
    return as_of_best(summary, run.read_metrics())


def _check_belongs(run: RunFolder, adapter: Path) -> None:
    """Refuse an adapter that is not the one that the run saved in this place."""
    told = read_summary(run).get("adapter_folders")  # none in a run of an older version
    place = adapter.resolve().relative_to(run.path.resolve()).as_posix()
    want = told.get(place) if isinstance(told, dict) else None
    if want is not None and read_json(adapter / NOTES).get("adapter_sha256") != want:
        raise UsageError(
            f"{adapter} is not the adapter that the run saved there (adapter_folders in "
            f"{SUMMARY}); put that one back, or use the folder outside the run"
        )


def in_run(path: str | Path) -> Path | None:
    """The run that a folder is an adapter of; None where it is a run itself, or in none."""
    path = Path(path)
    if RunFolder(path).is_run() or not path.is_dir():
        return None
    return next((p for p in path.resolve().parents[:2] if RunFolder(p).is_run()), None)


def adapter_folder(path: str | Path, best: bool = False) -> Path:
    """The adapter folder that a path means: that of a finished run, or the path itself."""
    is_run = RunFolder(Path(path)).is_run()
    return run_and_adapter(path, best)[1] if is_run or best else Path(path)


def load_run_model(folder: str | Path, *, best: bool = False) -> CLIPLoRAWrapper:
    """A finished run's model, with the last round's adapter and its classes, on the CPU.

    With `best` it has that of the best round by validation. `folder` may also be one adapter inside
    a run, such as `RUN/adapter_of/digits`, an adapter folder anywhere, or a model of
    `fedclip export --to merged`. Of the last two the weights hold all that was trained.
    """
    if not (best or of_run(folder)):
        return _without_run(Path(folder))
    run_folder, adapter = run_and_adapter(folder, best)
    config = load_config(run_folder.path / CONFIG)
    _, notes, _ = read_adapter(adapter)
    model = create_clip_model(
        model_config(config),
        class_names=notes.class_names or None,
        templates=notes.templates or None,
        seed=model_seed(config),
    )
    model.load_adapter(adapter)
    return model


def of_run(path: str | Path) -> bool:
    """Whether a path is a run or an adapter in one, and thus has the run's configuration."""
    return RunFolder(path).is_run() or in_run(path) is not None


def _without_run(folder: Path) -> CLIPLoRAWrapper:
    if (folder / CLASSES).is_file():
        return open_plain(folder)
    if (folder / NOTES).is_file() or (folder / PEFT_CONFIG).is_file():
        return open_adapter(folder)
    why = f"it has no {CONFIG}, {NOTES}, {PEFT_CONFIG} or {CLASSES}"
    raise UsageError(
        f"{folder} is no run, adapter or exported model: "
        f"{why if folder.exists() else 'it does not exist'}; name a folder that `fedclip run`, "
        "`merge` or `export` made"
    )


def refuse_files(config: Config, doing: str) -> None:
    """Refuses a run whose data sets are read by a file of code that its folder names.

    Whoever runs or resumes a configuration trusts it; whoever looks at a finished run need not.
    """
    data = [config.data, *config.tasks.values()] if config.tasks else [config.data]
    named = [section.name for section in data] + list(config.evaluation.other_data)
    files = [name for name in named if in_file(name)]
    if files:
        raise UsageError(
            f"data.name: {files[0]} is a file of code that this run's folder names, and {doing} "
            "runs no such files; install the data set as an entry point of fedclip.data_sets and "
            "name that, or use what needs no data set, such as fedclip predict"
        )


def without_files(config: Config, doing: str) -> Config:
    """A finished run's configuration as far as it names no file of code; says what it leaves out.

    An engine is for training only.
    """
    refuse_files(config, doing)
    metrics = tuple(name for name in config.evaluation.metrics if not in_file(name))
    for name in sorted(set(config.evaluation.metrics) - set(metrics)):
        text = f"evaluation.metrics: {name} is a file of code, which {doing} does not run; left out"
        warnings.warn(text, FedclipWarning, stacklevel=3)
    engine = "sequential" if in_file(config.engine.name) else config.engine.name
    return config.model_copy(
        update={
            "engine": config.engine.model_copy(update={"name": engine}),
            "evaluation": config.evaluation.model_copy(update={"metrics": metrics}),
        }
    )


def public_name(model_name: str) -> str:
    """A base model's name without the folders of the machine that trained on it."""
    return Path(model_name).name if Path(model_name).is_absolute() else model_name
