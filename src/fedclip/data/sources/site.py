"""One site's local images, as its part of a federation over several machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedclip.config.names import check_classes_differ, class_key
from fedclip.data.source import ImageSource, some
from fedclip.data.sources.imagefolder import imagefolder
from fedclip.errors import UsageError


def site_source(
    path: str, site: str, class_names: Sequence[str], folders: Mapping[str, str] | None = None
) -> ImageSource:
    """The images of a folder `<class>/*` under the run's classes, all of one site.

    `folders` says which class a folder is, where that is not its name. The run may have classes
    that the site has no image of, not the other way round. The site's examples are then those
    that it would have in one folder `<site>/<class>/*` with all other sites'.
    """
    source = imagefolder(path, "classes")
    check_classes_differ(class_names, "the run's classes")
    given = {class_key(name): target for name, target in (folders or {}).items()}
    own = [given.get(class_key(name), name) for name in source.class_names]
    known = [class_key(name) for name in class_names]
    unknown = [name for name in own if class_key(name) not in known]
    if unknown:
        raise UsageError(
            f"the data have classes that the run does not know: {some(unknown)}; its classes are "
            f"{some(class_names)}. Rename the folders, or say which class each is under `classes`"
        )
    index = np.array([known.index(class_key(name)) for name in own], dtype=np.int64)
    return replace(
        source,
        labels=index[source.labels],
        class_names=tuple(class_names),
        sites=np.zeros(len(source), dtype=np.int64),
        site_names=(site,),
    )
