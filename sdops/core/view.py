"""A Source that looks at another one: the base of those that change names, numbers or where bytes come from."""

from __future__ import annotations

from collections.abc import Mapping

from sdops.core.source import Source, splits
from sdops.core.spec import Spec


class View:
    """A Source that looks like another one; subclasses change what they name.

    Args:
        source: What is looked at.
        specs: The tensors that the view offers.
    """

    def __init__(self, source: Source, specs: Mapping[str, Spec]) -> None:
        self.source = source
        self.name = source.name
        self.specs = specs
        self.metadata = source.metadata

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """As the source's."""
        self.source.read_into(key, start, buffer)

    def splits(self, key: str) -> bool:
        """As the source's."""
        return splits(self.source, key)

    def close(self) -> None:
        """Close the source."""
        self.source.close()
