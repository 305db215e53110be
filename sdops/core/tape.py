"""Learn what an elementwise merge method does by calling it with symbols instead of tensors. No torch, no numpy.

Calling a formula with `Symbol`s records every operation on a `Tape`, equal ones once. core/tape.c then plays it on
blocks of elements that stay in the processor's first cache: inputs are read and the result is written once, where torch
goes through memory for every operation. Each operation rounds to float32 as torch's does, so the bits are torch's.

Symbols do what the functions of core/elementwise.py need. A method that does anything else (`torch.sort(x)`, `x.sum()`)
cannot be recorded, and runs in torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, auto
from typing import Any

MOST_REGISTERS = 64  # REGISTERS of tape.c


class Op(IntEnum):
    """Operations, in the order of `enum op` in tape.c. Masks are all ones or all zeros."""

    CONSTANT = 0  # the number x; fills a register before the tape is played
    LOAD = auto()  # elements of input x as float32
    UNIFORM = auto()  # random numbers in [0, 1): the draw x
    NORMAL = auto()  # standard normal random numbers: the draw x
    ADD = auto()
    SUBTRACT = auto()
    MULTIPLY = auto()
    DIVIDE = auto()
    SQRT = auto()
    ABSOLUTE = auto()
    NEGATE = auto()
    COPYSIGN = auto()  # size of x, sign of y
    MAXIMUM = auto()  # y if y > x or y is NaN, else x
    MINIMUM = auto()
    LESS = auto()  # mask
    LESS_EQUAL = auto()  # mask
    EQUAL = auto()  # mask
    AND = auto()  # of masks; of a mask and a number: the number or +0
    OR = auto()  # of masks
    NOT = auto()  # of a mask
    CHOOSE = auto()  # x where mask z, else y
    POWER = auto()  # x^y for x >= 0 and a constant y
    GEOMETRIC_MEAN = auto()  # x^(1 - z) y^z for x, y >= 0 and a constant z between 0 and 1


LEAVES = (Op.CONSTANT, Op.LOAD, Op.UNIFORM, Op.NORMAL)
COMMUTATIVE = (Op.ADD, Op.MULTIPLY, Op.EQUAL, Op.AND, Op.OR)


class UntraceableError(Exception):
    """A method does something that the tape has no operation for."""


@dataclass(frozen=True)
class Program:
    """A tape with registers in place of values.

    Attributes:
        code: One instruction after the other: operation, register of the result, operands x, y, z (0 where there are
            none): registers; of LOAD the input, of UNIFORM the draw.
        constants: What the first registers hold.
        result: The register that holds the result in the end.
        draws: Model and stream of each draw of random numbers.
    """

    code: Sequence[tuple[int, int, int, int, int]]
    constants: Sequence[float]
    result: int
    draws: Sequence[tuple[int, int]]


@dataclass
class Tape:
    """Everything that was computed.

    Attributes:
        values: Operation and operands of each value, in order. Operands are the indices of earlier values.
        draws: Model and stream of each draw of random numbers.
    """

    values: list[tuple[Any, ...]] = field(default_factory=list)
    draws: list[tuple[int, int]] = field(default_factory=list)
    _indices: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def emit(self, op: Op, *operands: int) -> int:
        """The index of a value, which is recorded unless it has been."""
        if op in COMMUTATIVE:
            operands = tuple(sorted(operands))
        if op == Op.MULTIPLY and self._is_one(operands[0]):
            return operands[1]
        if op in (Op.MULTIPLY, Op.DIVIDE) and self._is_one(operands[1]):
            return operands[0]
        return self._record(op, *operands)

    def constant(self, number: float) -> int:
        """The index of a number, rounded to float32 as torch does when it meets a tensor."""
        value = single(number)
        return self._record(Op.CONSTANT, value, math.copysign(1, value))  # 0 and -0 are equal, but not the same

    def _is_one(self, index: int) -> bool:
        return self.values[index][:2] == (Op.CONSTANT, 1.0)

    def _record(self, *value: Any) -> int:
        if value not in self._indices:
            self._indices[value] = len(self.values)
            self.values.append(value)
        return self._indices[value]

    def program(self, result: int, inputs: int) -> Program:
        """What must be done for one value. All inputs are loaded, used or not: each is checked for NaN.

        Raises:
            UntraceableError: it takes too many registers.
        """
        loads = [self.emit(Op.LOAD, number) for number in range(inputs)]
        order = _ordered(self.values, [*loads[::-1], result])
        constants = [index for index in order if self.values[index][0] == Op.CONSTANT]
        steps = [index for index in order if self.values[index][0] != Op.CONSTANT]
        last = {operand: place for place, index in enumerate(steps) for operand in _operands(self.values[index])}
        registers = {index: register for register, index in enumerate(constants)}
        free = list(range(MOST_REGISTERS - 1, len(constants) - 1, -1))
        code = []
        for place, index in enumerate(steps):
            op, *operands = self.values[index]
            if not free:
                raise UntraceableError("too many values at once")
            registers[index] = free.pop()  # before those of the operands are free: the compiler counts on that
            sources = operands if op in LEAVES else [registers[operand] for operand in operands]
            code.append((int(op), registers[index], *(*sources, 0, 0)[:3]))
            ended = {index, *_operands(self.values[index])} - {result, *constants}
            free += [registers[value] for value in ended if last.get(value, place) == place]
        return Program(code, [self.values[index][1] for index in constants], registers[result], tuple(self.draws))


def _operands(value: tuple[Any, ...]) -> tuple[int, ...]:
    return () if value[0] in LEAVES else value[1:]


def _ordered(values: Sequence[tuple[Any, ...]], wanted: Sequence[int]) -> list[int]:
    """The values that are needed, each after its operands and as late as possible; the last wanted first."""
    order: list[int] = []
    seen: set[int] = set()
    stack = [(index, False) for index in wanted]
    while stack:
        index, complete = stack.pop()
        if complete:
            order.append(index)
        elif index not in seen:
            seen.add(index)
            stack.append((index, True))
            operands = sorted(_operands(values[index]), key=lambda operand: values[operand][0] in LEAVES)
            stack += [(operand, False) for operand in reversed(operands)]  # what must be worked out before leaves
    return order


def single(number: float) -> float:
    """The float32 nearest to a number; infinity beyond its range."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", number))[0])
    except OverflowError:
        return math.copysign(math.inf, number)


# ---------------------------------------------------------------------------------------------------------- the symbols


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """A comparison's result, in place of a tensor of bools."""

    tape: Tape
    index: int

    def __bool__(self) -> bool:
        raise UntraceableError("there is no number yet to decide by")

    def __and__(self, other: Mask) -> Mask:
        return Mask(self.tape, self.tape.emit(Op.AND, self.index, other.index))

    def __or__(self, other: Mask) -> Mask:
        return Mask(self.tape, self.tape.emit(Op.OR, self.index, other.index))

    def __invert__(self) -> Mask:
        return Mask(self.tape, self.tape.emit(Op.NOT, self.index))


@dataclass(frozen=True, slots=True, eq=False)
class Symbol:
    """A value of the tape, in place of a tensor. Numbers become float32 when they meet one."""

    tape: Tape
    index: int
    __array_ufunc__ = None  # numpy's numbers shall leave it to the symbol what becomes of the two

    def _index(self, x: Any) -> int:
        if isinstance(x, Symbol | Mask):
            return x.index
        if isinstance(x, int | float):
            return self.tape.constant(x)
        raise UntraceableError(f"a symbol meets {x!r}")

    def made(self, op: Op, *operands: Symbol | Mask | float) -> Symbol:
        """The result of an operation on this symbol, and perhaps others."""
        return Symbol(self.tape, self.tape.emit(op, *map(self._index, operands)))

    def compared(self, op: Op, *operands: Symbol | float) -> Mask:
        """The result of a comparison."""
        return Mask(self.tape, self.tape.emit(op, *map(self._index, operands)))

    def __add__(self, other: Symbol | float) -> Symbol:
        return self.made(Op.ADD, self, other)

    __radd__ = __add__

    def __sub__(self, other: Symbol | float) -> Symbol:
        return self.made(Op.SUBTRACT, self, other)

    def __rsub__(self, other: float) -> Symbol:
        return self.made(Op.SUBTRACT, other, self)

    def __mul__(self, other: Symbol | float) -> Symbol:
        return self.made(Op.MULTIPLY, self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Symbol | float) -> Symbol:
        return self.made(Op.DIVIDE, self, other)

    def __rtruediv__(self, other: float) -> Symbol:
        return self.made(Op.DIVIDE, 1.0, self) * other  # as torch does

    def __neg__(self) -> Symbol:
        return self.made(Op.NEGATE, self)

    def __abs__(self) -> Symbol:
        return self.made(Op.ABSOLUTE, self)

    def __lt__(self, other: Symbol | float) -> Mask:
        return self.compared(Op.LESS, self, other)

    def __le__(self, other: Symbol | float) -> Mask:
        return self.compared(Op.LESS_EQUAL, self, other)

    def __gt__(self, other: Symbol | float) -> Mask:
        return self.compared(Op.LESS, other, self)

    def __ge__(self, other: Symbol | float) -> Mask:
        return self.compared(Op.LESS_EQUAL, other, self)

    def __eq__(self, other: object) -> bool:
        raise UntraceableError("`zeros_of` tells where a tensor is 0")

    __hash__ = object.__hash__


class Draws:
    """Random numbers as core.noise makes them, in place of a Noise."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def uniform(self, model: int, like: Symbol, stream: int = 0) -> Symbol:
        """See `Noise.uniform`."""
        del like
        return Symbol(self._tape, self._tape.emit(Op.UNIFORM, self._draw(model, stream)))

    def normal(self, model: int, like: Symbol, stream: int = 0) -> Symbol:
        """See `Noise.normal`."""
        del like
        return Symbol(self._tape, self._tape.emit(Op.NORMAL, self._draw(model, stream)))

    def _draw(self, model: int, stream: int) -> int:
        draws = self._tape.draws
        if (model, stream) not in draws:
            draws.append((model, stream))
        return draws.index((model, stream))


def record(call: Callable[..., Any], count: int, **supplied: Any) -> Program:
    """What a function of `count` inputs does to each element.

    Args:
        call: Called with that many symbols, the keyword `noise`, and the others given.
        count: Number of inputs.
        supplied: Further keywords.

    Raises:
        UntraceableError: it does something that is no operation of single elements, or that the tape does not know.
    """
    tape = Tape()
    inputs = [Symbol(tape, tape.emit(Op.LOAD, number)) for number in range(count)]
    try:
        result = call(*inputs, noise=Draws(tape), **supplied)
    except (TypeError, AttributeError) as error:  # torch's functions and tensors' methods know no symbols
        raise UntraceableError(str(error)) from error
    if not isinstance(result, Symbol):
        raise UntraceableError("the result is no symbol")
    return tape.program(result.index, count)
