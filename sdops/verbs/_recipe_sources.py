"""What the steps of a recipe read, where it is not simply a file or another step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from sdops.core.remembered import Remembered
from sdops.core.source import Source
from sdops.core.view import View
from sdops.formats import FileSource
from sdops.verbs._inputs import Opened
from sdops.verbs._provenance import RECIPE

if TYPE_CHECKING:
    from sdops.verbs._recipe_convert import Converted
    from sdops.verbs.apply import Apply
    from sdops.verbs.merge import Merge


class SharedStep(Remembered):
    """A step that several others read, which says of itself how it is made, as the step does.

    Args:
        made: The planned step.
    """

    def __init__(self, made: Merge | Apply | Converted) -> None:
        super().__init__(cast("Source", made))
        self.parts = made.parts
        self.made = made.made


class MadeFile(View):
    """A LoRA that a step has made, which says how.

    Args:
        file: The file, which vanishes when the recipe is built.
        parts: What it was made of, in the order of its record.
    """

    def __init__(self, file: Source, parts: Mapping[str, Opened]) -> None:
        super().__init__(file, file.specs)
        self.parts = parts
        self.made: Mapping[str, Any] = json.loads(file.metadata[RECIPE])

    def close(self) -> None:
        """Nothing: other steps may read it, too."""


class NamedFile(View):
    """A file under the name that a recipe knows it by.

    Args:
        file: The opened file.
        name: Its name in the recipe.
    """

    def __init__(self, file: FileSource, name: str) -> None:
        super().__init__(file, file.specs)
        self.name = name
        self.file = file
        self.path, self.files, self.warnings = file.path, file.files, file.warnings

    def check_unchanged(self) -> None:
        """As the file's."""
        self.file.check_unchanged()
