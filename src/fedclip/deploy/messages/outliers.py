"""Updates of sites that are too large beside those of the others."""

from __future__ import annotations

from collections.abc import Mapping

from fedclip.deploy.messages.replies import Refused
from fedclip.federated.update_checks import outliers


def too_large(
    changes: Mapping[str, float], times: float, usual: float | None
) -> dict[str, Refused]:
    """Why updates of such norms are not taken, by site: more than `times` what others have.

    Each is compared with the median of the others, a single one with `usual`, if there is one.
    """
    return {
        site: Refused(
            f"{site} sends an update {found.times:.0f} times as large as the others' "
            f"(norm {found.norm:.3g}); {times:g} times is the limit (deploy.largest_update)",
            kind="size",
            figure=found.times,
        )
        for site, found in outliers(changes, times, usual).items()
    }
