"""What a file holds besides named tensors: dicts, lists, numbers and texts, with Leafs where its tensors are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdops.core.spec import Spec


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor in a tree of plain values.

    Attributes:
        key: Its name among the tensors that come with the tree.
        spec: Dtype and shape.
    """

    key: str
    spec: Spec


@dataclass(frozen=True, slots=True)
class Saved:
    """What a file holds, whatever its container.

    Attributes:
        tree: Plain values with Leafs; safetensors are a dict of Leafs.
        metadata: Texts beside the tensors.
        stem: The file's name without its ending.
    """

    tree: Any
    metadata: Mapping[str, str]
    stem: str

    def entries(self) -> dict[Any, Any]:
        """The tree if it is a dict, else nothing."""
        return self.tree if type(self.tree) is dict else {}
