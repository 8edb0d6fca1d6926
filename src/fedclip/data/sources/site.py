"""One site's own images, as its part of a federation that is divided over machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedclip.data.prompts import clean_class_name
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
    given = {clean_class_name(name): target for name, target in (folders or {}).items()}
    own = [given.get(name, name) for name in source.class_names]
    known = [clean_class_name(name).casefold() for name in class_names]
    unknown = [name for name in own if clean_class_name(name).casefold() not in known]
    if unknown:
        raise UsageError(
            f"the data have classes that the run does not know: {some(unknown)}; its classes are "
            f"{some(class_names)}. Rename the folders, or say which class each is under `classes`"
        )
    index = np.array([known.index(clean_class_name(n).casefold()) for n in own], dtype=np.int64)
    return replace(
        source,
        labels=index[source.labels],
        class_names=tuple(class_names),
        sites=np.zeros(len(source), dtype=np.int64),
        site_names=(site,),
    )
