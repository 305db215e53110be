"""Convert in the order in which the input lies in its file, if that is read over the net: every byte comes once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from sdops.core.sink import Sink
from sdops.verbs._convert_draft import Entry


def as_inputs_lie(sink: Sink, tensors: Mapping[str, Entry]) -> Sink:
    """The sink with its tensors in the order of the bytes that they are made of.

    Sinks take tensors in any order; the output is the same.

    Args:
        sink: The output, entered.
        tensors: How its tensors come about. What else it has (scales of a weight) comes with the weight, or last.
    """
    ranks: dict[int, tuple[int, dict[str, int]]] = {}  # Source -> its place among others, and that of each tensor

    def place(key: str) -> tuple[int, int, int]:
        entry = tensors.get(key) or tensors.get(f"{key.rpartition('.')[0]}.weight")
        if entry is None:
            return len(tensors), 0, 0
        first = entry.made.ranges[0]
        if id(first.source) not in ranks:
            ranks[id(first.source)] = len(ranks), {name: i for i, name in enumerate(first.source.specs)}
        number, places = ranks[id(first.source)]
        return number, places[first.key], first.start

    return cast("Sink", _Reordered(sink, sorted(sink.specs, key=place)))


class _Reordered:
    """A sink whose tensors are named in another order."""

    def __init__(self, sink: Sink, order: list[str]) -> None:
        self._sink = sink
        self.specs = {key: sink.specs[key] for key in order}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sink, name)
