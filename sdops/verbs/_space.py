"""Room on the disk, told to those who only plan: the work may be done elsewhere."""

from __future__ import annotations

from pathlib import Path

from sdops.core.sink import check_space
from sdops.errors import OutputError


def lacking_space(output: Path, nbytes: int) -> list[str]:
    """A warning if an output of that size would be refused here, or nothing."""
    try:
        check_space(output.absolute(), nbytes)
    except OutputError as error:
        return [f"{error.message}: here it would be refused"]
    return []
