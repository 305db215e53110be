"""What a written tensor is made of: blocks of the file's tensors, moved but hardly ever computed with.

Tensors are seen as matrices [size of dim 0, everything else]; a recipe places blocks on zeros. No values here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

from sdops.core.spec import Spec

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Block:
    """Rows and columns of a tensor of the file, times a factor, put so that the first element is `at` (row, column).

    `size` is the rows and columns that the whole tensor has.
    """

    key: str
    size: tuple[int, int]
    rows: Range
    columns: Range
    at: tuple[int, int] = (0, 0)
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """A tensor to write: `value` in every element, or else zeros with blocks on them, and `offset` added to all.

    `matrix` is the rows and columns of the zeros; the result is then given the spec's shape.
    """

    spec: Spec
    matrix: tuple[int, int] = (1, 1)
    blocks: tuple[Block, ...] = ()
    value: float | None = None
    offset: float = 0.0

    @property
    def copied(self) -> str | None:
        """The tensor that this one has exactly the values of, in order; None if there is no such tensor."""
        if len(self.blocks) != 1 or self.blocks[0].factor != 1.0 or self.offset:
            return None
        block = self.blocks[0]
        everything = (block.rows, block.columns) == ((0, block.size[0]), (0, block.size[1]))
        return block.key if everything and block.size == self.matrix else None

    def number(self, values: Values) -> float:
        """The first element."""
        return values.number(self.blocks[0].key) * self.blocks[0].factor if self.value is None else self.value


class Values(Protocol):
    """The few questions on values that writing asks."""

    def number(self, key: str) -> float:
        """The first element of a tensor."""

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same values."""

    def nonzero_columns(self, key: str, rows: Range) -> Range:
        """First and one past the last column that is not zero in these rows; (0, 0) if all are."""


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def whole(key: str, specs: Mapping[str, Spec]) -> Recipe:
    """A tensor as it is."""
    rows, columns = size = matrix(specs[key].shape)
    return Recipe(specs[key], size, (Block(key, size, (0, rows), (0, columns)),))


def number(value: float) -> Recipe:
    """A number of its own, float32 without dimensions, as kohya saves alphas."""
    return Recipe(Spec("F32", ()), value=value)


def reshaped(recipe: Recipe, shape: tuple[int, ...]) -> Recipe:
    """The same values in order in another shape."""
    return replace(recipe, spec=Spec(recipe.spec.dtype, shape))


def cut_rows(recipe: Recipe, rows: Range) -> Recipe:
    """Some rows of a whole tensor."""
    return _cut(recipe, rows, (0, recipe.matrix[1]))


def cut_columns(recipe: Recipe, columns: Range) -> Recipe:
    """Some columns of a whole tensor, as long as dim 1 holds them all (a factor `[o, r]` or `[o, r, 1, 1]`)."""
    return _cut(recipe, (0, recipe.matrix[0]), columns)


def _cut(recipe: Recipe, rows: Range, columns: Range) -> Recipe:
    (block,) = recipe.blocks
    first, left = block.rows[0], block.columns[0]
    part = replace(block, rows=(first + rows[0], first + rows[1]), columns=(left + columns[0], left + columns[1]))
    shape = list(recipe.spec.shape)
    shape[0] = rows[1] - rows[0]
    if len(shape) > 1 and columns != (0, recipe.matrix[1]):
        shape[1] = columns[1] - columns[0]
    return Recipe(Spec(recipe.spec.dtype, tuple(shape)), matrix(shape), (part,))


def swapped(recipe: Recipe) -> Recipe:
    """The two halves of the rows of a whole tensor, exchanged."""
    count = recipe.matrix[0]
    half = count // 2
    (block,) = recipe.blocks
    first = block.rows[0]
    upper = replace(block, rows=(first + half, first + count), at=(0, 0))
    lower = replace(block, rows=(first, first + half), at=(count - half, 0))
    return replace(recipe, blocks=(upper, lower))


def scaled(recipe: Recipe, factor: float) -> Recipe:
    """Times a factor; in a dtype in which that costs no more than float32's rounding."""
    if factor == 1.0:
        return recipe
    blocks = tuple(replace(block, factor=block.factor * factor) for block in recipe.blocks)
    dtype = recipe.spec.dtype if recipe.spec.dtype == "F64" else "F32"
    return replace(recipe, spec=Spec(dtype, recipe.spec.shape), blocks=blocks)


def shifted(recipe: Recipe, offset: float) -> Recipe:
    """Plus a number, in float32: what is 1 + x in one dialect is x in another."""
    dtype = recipe.spec.dtype if recipe.spec.dtype == "F64" else "F32"
    return replace(recipe, spec=Spec(dtype, recipe.spec.shape), offset=recipe.offset + offset)


def placed(parts: Sequence[tuple[Recipe, tuple[int, int]]], shape: tuple[int, ...]) -> Recipe:
    """Tensors put onto zeros of a shape, each at a row and column."""
    dtypes = {recipe.spec.dtype for recipe, _ in parts}
    blocks = tuple(
        replace(block, at=(block.at[0] + row, block.at[1] + column))
        for recipe, (row, column) in parts
        for block in recipe.blocks
    )
    return Recipe(Spec(dtypes.pop() if len(dtypes) == 1 else "F32", shape), matrix(shape), blocks)
