"""A merge method as the engine calls it: its function, what it must see of a tensor, and its optional companions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any


@dataclass(frozen=True)
class Method:
    """One file of the merges shelf, imported.

    Attributes:
        name: The file's name.
        execution: See the shelf's contract (`sdops/merges/__init__.py`).
        needs: Keywords that the engine supplies: gram, noise, kept, state, key.
        function: The method itself.
        scores: For "ranked" methods, the scores whose order statistics decide.
        window: For "ranked" methods, which ranks are kept.
        prepare: For "model" methods, the pass over the whole model.
    """

    name: str
    execution: str
    needs: frozenset[str]
    function: Callable[..., Any]
    scores: Callable[..., Any] | None = None
    window: Callable[..., tuple[int, int]] | None = None
    prepare: Callable[..., Any] | None = None

    @property
    def needs_gram(self) -> bool:
        """Whether whole-tensor inner products are needed before the first element of the result."""
        return self.execution == "gram" or "gram" in self.needs

    def call(self, function: Callable[..., Any] | None, *inputs: Any, knobs: Mapping[str, Any], **supplied: Any) -> Any:
        """Call one of the functions with those knobs and supplied keywords that it takes."""
        if function is None:
            raise TypeError(f"`{self.name}` lacks a function that its execution class `{self.execution}` needs")
        taken = _keywords(function)
        keywords = {k: v for k, v in (*knobs.items(), *supplied.items()) if k in taken}
        return function(*inputs, **keywords)


@cache
def _keywords(function: Callable[..., Any]) -> frozenset[str]:
    """Names of a function's parameters; looking them up takes longer than a small portion's arithmetic."""
    return frozenset(signature(function).parameters)


def load(module: str, execution: str, needs: frozenset[str]) -> Method:
    """Import a method's file. Linear ones come without torch."""
    file = import_module(module)
    name = module.rpartition(".")[2]
    return Method(
        name,
        execution,
        needs,
        getattr(file, name),
        scores=getattr(file, "scores", None),
        window=getattr(file, "window", None),
        prepare=getattr(file, "prepare", None),
    )
