"""What a file holds besides named tensors: dicts, lists, numbers and texts, with Leafs where its tensors are."""

from __future__ import annotations

from dataclasses import dataclass

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
