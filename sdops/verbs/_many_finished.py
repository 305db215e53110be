"""Whether an output is there already, from a run that was cut short: its header records what would be done again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdops.errors import SdopsError
from sdops.formats import open_source
from sdops.report import Progress
from sdops.verbs._hashes import Hashes
from sdops.verbs._provenance import RECIPE, with_hashes, without_hashes

if TYPE_CHECKING:
    from sdops.verbs._recipe_plan import Planned


def is_finished(planned: Planned, output: Path, progress: Progress) -> bool:
    """Whether a file is what a planned recipe makes, to the byte: outputs get their name when they are complete, and
    the same record with the same hashes of all inputs gives the same bytes.

    Of results that record no hashes, or are no checkpoints, nobody can tell.

    Args:
        planned: The recipe.
        output: The file that is there.
        progress: Called as `progress(label, total_bytes)` while inputs are hashed.
    """
    if planned.is_trial or planned.outputs() or not planned.result.is_lazy or not output.is_file():
        return False
    made = planned.result.lazy()
    try:
        there = open_source(output)
    except SdopsError:
        return False
    try:
        recorded, specs = there.metadata.get(RECIPE, ""), dict(there.specs)
    finally:
        there.close()
    if specs != dict(made.specs) or not _is_alike(recorded, made.metadata[RECIPE]):
        return False
    with Hashes(made.parts.values(), enabled=True) as hashes:
        return recorded == with_hashes(made.metadata[RECIPE], hashes.wait(progress))


def _is_alike(recorded: str, planned: str) -> bool:
    """Whether two records differ in nothing but hashes; asked first, since hashes may have to be computed."""
    try:
        return without_hashes(recorded) == without_hashes(planned)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # no record of ours
