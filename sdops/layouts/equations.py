"""Equations between the names of two layouts: parsed, spelled out, and read in either direction.

    left = right                     one name each
    left = right + right + 4*right   the rows of the right names, one below the other, numbers of rows in proportion
    left = swap(right)               likewise transpose(...), conv(...)

Both sides are templates (`core/template.py`) that run in step. `<part>` at the end of both sides stands for the
equations of that part, under each pair of names; a line without equals sign has the same names on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sdops.core.template import alternatives

INVERSE = {"": "", "swap": "swap", "transpose": "transpose", "conv": "linear"}

Share = tuple[int, int, int]


class Part(NamedTuple):
    """Some rows of a tensor, and what is done with them.

    Attributes:
        key: The tensor, in the layout that is read.
        share: Rows start/total .. stop/total of its dim 0; None for all of them. So no shape is needed.
        operation: "" | "swap" (the two halves of the rows) | "transpose" (2-D) | "linear" (drop trailing sizes of 1:
            a 1x1 convolution becomes a matrix) | "conv" (append two sizes of 1).
    """

    key: str
    share: Share | None = None
    operation: str = ""


Recipe = tuple[str, tuple[Part, ...]]  # a tensor of one layout, and what makes it, one below the other


@dataclass(frozen=True, slots=True)
class Equation:
    """One name of the left layout, and the names of the right one that it is made of."""

    left: str
    right: tuple[str, ...]
    sizes: tuple[int, ...] = (1,)
    operation: str = ""

    def under(self, left: str, right: str) -> Equation:
        """The same equation below a name on either side."""
        return Equation(left + self.left, tuple(right + name for name in self.right), self.sizes, self.operation)

    def of(self, end: str) -> Equation:
        """The equation of the tensor that ends so, if this one is about modules."""
        operation = "" if end == ".bias" and self.operation == "conv" else self.operation  # a bias is 1-D in both
        return Equation(self.left + end, tuple(name + end for name in self.right), self.sizes, operation)

    def forward(self) -> Iterator[Recipe]:
        """The right tensors, each made of rows of the left one."""
        total, start = sum(self.sizes), 0
        for name, size in zip(self.right, self.sizes, strict=True):
            share = None if size == total else (start, start + size, total)
            yield name, (Part(self.left, share, INVERSE[self.operation]),)
            start += size

    def backward(self) -> Iterator[Recipe]:
        """The left tensor, made of the right ones."""
        yield self.left, tuple(Part(name, None, self.operation) for name in self.right)


def parse(lines: str, ranges: Mapping[str, int], parts: Mapping[str, str]) -> list[Equation]:
    """All equations that some lines stand for."""
    found: list[Equation] = []
    for line in filter(None, map(str.strip, lines.splitlines())):
        left, _, right = map(str.strip, line.partition("="))
        right = right or left
        if left.endswith(">"):
            left, _, part = left.partition("<")
            below = parse(parts[part.removesuffix(">")], ranges, parts)
            heads = zip(alternatives(left, ranges), alternatives(right.partition("<")[0], ranges), strict=True)
            found += [equation.under(*head) for head in heads for equation in below]
        else:
            found += _spelled(left, right, ranges)
    return found


def _spelled(left: str, right: str, ranges: Mapping[str, int]) -> Iterator[Equation]:
    """The equations that one line without parts stands for."""
    operation, inner = "", right
    if call := re.fullmatch(r"(\w+)\((.*)\)", right):
        operation, inner = call.groups()
    terms = [term.strip().rpartition("*") for term in inner.split("+")]
    sizes = tuple(int(size or 1) for size, _, _ in terms)
    columns = [alternatives(name, ranges) for _, _, name in terms]
    for name, *names in zip(alternatives(left, ranges), *columns, strict=True):
        yield Equation(name, tuple(names), sizes, operation)
