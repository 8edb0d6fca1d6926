"""Any image-classification set that `datasets` opens: a hub id, or a local path."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from fedclip.data.source import ImageSource
from fedclip.data.sources.columns import Table
from fedclip.data.sources.hub_files import check_named_files, check_saved_files
from fedclip.data.sources.hub_images import roots_of
from fedclip.data.sources.table import by_split, source_of
from fedclip.errors import UsageError

OPTIONS = ("config", "revision", "image", "label", "caption", "site")


def hub(path: str | None = None, layout: str = "auto") -> ImageSource:
    """A data set of the hub, by id, or from disk: a `save_to_disk`, parquet or image folder.

    The image column and the label column are found by type and name. Where that is not enough,
    options follow the id: `user/name?config=small&label=kind&site=hospital`; `site` names a
    column whose values are natural sites. `caption` names a column of captions, which then take
    the place of classes; a cell with a list of captions makes a pair of each. `path` may be `.tar`
    shards of webdataset, whose captions are NAME.txt.
    """
    if not path:
        raise UsageError("data.path: hub needs a data set's id (user/name) or a local path")
    name, _, query = path.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = set(options) - set(OPTIONS)
    if unknown:
        raise UsageError(
            f"data.path: unknown option {', '.join(sorted(unknown))} in {path!r}; "
            f"known: {', '.join(OPTIONS)}"
        )
    with _bars_on_terminals_only():
        table = Table(name, "data.path", "choose one with ?{}=COLUMN after the id")
        parts = by_split(table, _open(name, options.get("config"), options.get("revision")))
        return source_of("hub", table, parts, options, roots_of(name))


def _open(name: str, config: str | None, revision: str | None) -> Any:
    """What `datasets` makes of the id or path; its failures as one message."""
    import datasets

    local = Path(name).expanduser()
    is_local = local.exists()
    try:
        if is_local and any(
            (local / mark).is_file() for mark in ("dataset_dict.json", "state.json")
        ):
            check_saved_files(local)
            return datasets.load_from_disk(str(local))
        if local.suffix == ".parquet" and local.is_file():
            return datasets.load_dataset("parquet", data_files=str(local))
        if local.suffix == ".tar":  # one shard, or a pattern of them
            return datasets.load_dataset("webdataset", data_files=str(local))
        source = str(local) if is_local else name
        if is_local:
            check_named_files(local, datasets.load_dataset_builder(source, config).config)
        return datasets.load_dataset(source, config, revision=revision)
    except UsageError:
        raise
    except Exception as error:  # the library raises a score of unrelated types
        reason = (str(error) or type(error).__name__).strip().split("\n")[0]
        advice = (
            "expected a save_to_disk folder, or parquet or image files in the hub's layout"
            if is_local
            else "check the id, the network and HF_HUB_OFFLINE, or give a local path"
        )
        raise UsageError(f"data.path: cannot open {name!r}: {reason}; {advice}") from error


@contextlib.contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """A download shows its progress to a person, and stays out of log files."""
    import datasets

    if sys.stderr.isatty() or datasets.utils.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
