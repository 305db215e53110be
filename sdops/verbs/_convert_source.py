"""A merge that has not been written, as something to convert: what is asked of a file is answered for its inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdops.archs.detect import detect
from sdops.core.run import piece_bytes
from sdops.core.source import Source
from sdops.core.view import View
from sdops.verbs._inputs import Opened
from sdops.verbs._provenance import RECIPE, compact, without_hashes


class Unfiled(View):
    """A Source that is no file.

    Args:
        source: A merge or the like.

    Attributes:
        path: The file that it would be.
        files: Those that it is made of.
        warnings: None of its own.
        recipe: How it is made, if it says so, without hashes: nobody waits for them here.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source, source.specs)
        self._leaves = Opened(source, source, detect(source.specs)).leaves()
        self.path = Path(source.name)
        self.files = [file for leaf in self._leaves for file in leaf.files]
        self.warnings: list[str] = []
        made: Mapping[str, Any] | None = getattr(source, "made", None)
        self.recipe = json.loads(without_hashes(compact(made))) if made else None
        self.metadata = {key: text for key, text in source.metadata.items() if key != RECIPE}

    def piece_bytes(self, key: str) -> int:
        """As the source's."""
        return piece_bytes(self.source, key)

    def check_unchanged(self) -> None:
        """Raises ChangedError if a file that it is made of is not what it was."""
        for leaf in self._leaves:
            leaf.check_unchanged()
