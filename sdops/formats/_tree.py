"""Takes the object of a torch file apart: a tree of plain values, and its tensors under names of their own."""

from __future__ import annotations

from typing import Any

from sdops.core.tree import Leaf
from sdops.formats._pickle import Opaque
from sdops.formats._torch import Tensor

_DEPTH = 12
_PLAIN = (str, int, float, bool)


class Trees:
    """Makes trees of saved objects.

    Every dict and list is looked at once, however often it occurs, and one that holds itself is empty there: what
    takes a few bytes in a pickle must not take for ever here.

    Attributes:
        root: The tree of what was taken.
        tensors: Name -> tensor, in the order in which they were met.
    """

    def __init__(self) -> None:
        self.root: Any = None
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[int, Any] = {}

    def take(self, value: Any) -> dict[str, Tensor]:
        """Make `root` of `value`; returns its tensors by name."""
        self.root = self.tree(value, _DEPTH)
        return self.tensors

    def tree(self, value: Any, depth: int) -> Any:
        """`value` with Leafs for tensors; None for what is neither plain nor a tensor, and for what lies too deep."""
        if type(value) in _PLAIN or value is None:
            return value
        if type(value) is Tensor:
            key = str(len(self.tensors))
            self.tensors[key] = value
            return Leaf(key, value.spec)
        if id(value) in self._seen:
            return self._seen[id(value)]
        if depth == 0:
            return None
        return self._inner(value, depth - 1)

    def _inner(self, value: Any, depth: int) -> Any:
        if type(value) is Opaque:
            parameters = _parameters(value)
            return None if parameters is None else self.tree(parameters, depth)
        if type(value) is dict:
            entries: dict[Any, Any] = {}
            self._seen[id(value)] = entries
            for key, item in value.items():
                if type(key) in (str, int):
                    entries[key] = self.tree(item, depth)
            return entries
        if type(value) in (list, tuple):
            items: list[Any] = []
            self._seen[id(value)] = items
            items += [self.tree(item, depth) for item in value]
            return items
        return None


def _parameters(module: Opaque) -> Any:
    """The tensors in a `torch.nn.ParameterDict`, wherever its version of torch kept them."""
    state = module.state
    if module.kind != "torch.nn.modules.container.ParameterDict" or type(state) is not dict:
        return None
    kept = state.get("_parameters")
    return kept if type(kept) is dict else None
