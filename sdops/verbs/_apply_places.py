"""Where the layers that an adapter names lie in a model: in which tensors, which rows, turned or not. No torch.

Adapters speak of the canonical layout; a model may have another, in which a layer's rows are spread over several
tensors (q, k and v), are part of a larger one, or are stored in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sdops.archs.detect import Component
from sdops.core.patch import Target
from sdops.core.spec import Spec
from sdops.layouts.tables import Part, layouts, made_of
from sdops.verbs._inputs import Opened

# What a module's parameters may be called.
_NAMES = {"weight": (".weight", ".scale", ""), "bias": (".bias",)}


class Piece(NamedTuple):
    """Rows `begin .. begin + rows` of a patch, and the rows of a model's tensor that they change.

    Attributes:
        key: The model's tensor.
        start: First of its rows; columns if `turned`.
        begin, rows: Rows of the patch.
        turned: The tensor is stored transposed.
    """

    key: str
    start: int
    begin: int
    rows: int
    turned: bool = False


class _Run(NamedTuple):
    """Consecutive rows that correspond: `rows` of them from `here` on one side, from `there` on the other."""

    here: int
    there: int
    rows: int


@dataclass(frozen=True, slots=True)
class Place:
    """A layer's parameter in a model.

    Attributes:
        parts: The model's tensors that make it, one below the other.
        shapes: Theirs, after what is done with them.
    """

    parts: tuple[Part, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter in the canonical layout."""
        first = self.shapes[0]
        return (sum(shape[0] for shape in self.shapes), *first[1:]) if first else ()

    @property
    def is_whole(self) -> bool:
        """Whether it is one tensor of the model as it is."""
        return len(self.parts) == 1 and self.parts[0][1:] == (None, "")

    def shape_of(self, target: Target) -> tuple[int, ...]:
        """The shape of the rows that a target means."""
        first, last = _rows(target, self.shape)
        return (last - first, *self.shape[1:]) if self.shape else ()

    def pieces(self, target: Target) -> Iterator[Piece]:
        """Which rows of the patch change which rows of which tensor."""
        if self.parts[0].operation == "transpose":
            yield Piece(self.parts[0].key, 0, 0, self.shape[0], turned=True)
            return
        first, last = _rows(target, self.shape)
        wanted = list(_runs(0, first, last - first, swapped=target.swapped))
        position = 0
        for part, shape in zip(self.parts, self.shapes, strict=True):
            rows = shape[0] if shape else 1
            start, _, total = part.share or (0, 1, 1)
            span = rows if part.share is None else rows // (part.share[1] - part.share[0]) * total
            for own in _runs(position, span * start // total, rows, swapped=part.operation == "swap"):
                for run in wanted:
                    begin, end = max(run.there, own.here), min(run.there + run.rows, own.here + own.rows)
                    if begin < end:
                        yield Piece(part.key, own.there + begin - own.here, run.here + begin - run.there, end - begin)
            position += rows


def _rows(target: Target, shape: tuple[int, ...]) -> tuple[int, int]:
    """First and one past the last row that a target means."""
    start, stop, total = target.share or (0, 1, 1)
    rows = shape[0] if shape else 1
    return rows * start // total, rows * stop // total


def _runs(here: int, there: int, rows: int, *, swapped: bool) -> Iterator[_Run]:
    """One run, or two if the halves are swapped on one of the sides."""
    if not swapped:
        yield _Run(here, there, rows)
        return
    half = rows // 2
    yield _Run(here, there + half, rows - half)
    yield _Run(here + rows - half, there, half)


class Places:
    """All layers of a model by their canonical names.

    Args:
        model: Any model.
    """

    def __init__(self, model: Opened) -> None:
        self.model = model
        self._made: dict[str, Mapping[str, tuple[Part, ...]]] = {}

    def find(self, target: Target, parameter: str) -> Place | None:
        """Where a layer's `weight` or `bias` is; None if the model has none."""
        made = self._made_of(target.component)
        names = (target.module + end for end in _NAMES[parameter])
        parts = next((made[name] for name in names if name in made), None)
        if parts is None:
            return None
        specs = self.model.source.specs
        return Place(parts, tuple(_shape(specs[part.key], part) for part in parts))

    def _made_of(self, name: str) -> Mapping[str, tuple[Part, ...]]:
        if name not in self._made:
            component = self.model.detection.component(name)
            self._made[name] = {} if component is None else _canonical(self.model, component)
        return self._made[name]


def _canonical(model: Opened, component: Component) -> Mapping[str, tuple[Part, ...]]:
    """Names of a component's tensors in the canonical layout -> what makes them."""
    specs, family, prefix = model.source.specs, model.detection.family, component.prefix
    keys = [key.removeprefix(prefix) for key in component.keys if key in specs]
    known = layouts(family, component.name)
    if not known or component.layout == known[0]:
        return {key: (Part(prefix + key),) for key in keys}
    made = made_of(family, component.name, component.layout, known[0], keys)
    return {new: tuple(part._replace(key=prefix + part.key) for part in parts) for new, parts in made.items()}


def _shape(spec: Spec, part: Part) -> tuple[int, ...]:
    """A part's shape, after what is done with it."""
    shape = spec.shape
    if part.share is not None:
        start, stop, total = part.share
        shape = (shape[0] * (stop - start) // total, *shape[1:])
    if part.operation == "transpose":
        return shape[::-1]
    if part.operation == "linear":
        return shape[:2]
    return (*shape, 1, 1) if part.operation == "conv" else shape
