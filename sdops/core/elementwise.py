"""What merge formulas do to elements besides + - * /: on torch tensors, and on the symbols of a tape (core/tape.py).

A formula made of these, of operators, abs() and < <= > >= needs no torch of its own, and has the same bits either way.
For that reason `maximum`, `minimum` and `lerp` differ a little from torch's functions of those names, which take fused
operations or other signs of zero for all of a tensor but its last few elements.

Tensors choose by arithmetic: torch.where branches at every element and guesses wrong at every other one of a mask
without a pattern, and comparisons that write bools are slow too; what follows takes a tenth to a third of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from sdops.core.tape import Mask, Op, Symbol, UntraceableError

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def _symbols(of_symbols: Callable[..., Symbol]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Gives calls whose first argument is no tensor but a symbol to that function."""

    def decorate(of_tensors: Callable[P, R]) -> Callable[P, R]:
        @wraps(of_tensors)
        def either(*args: P.args, **kwargs: P.kwargs) -> R:
            if isinstance(args[0], Symbol | Mask):
                return cast(R, of_symbols(*args, **kwargs))
            return of_tensors(*args, **kwargs)

        return either

    return decorate


@_symbols(lambda mask, x, y: x.made(Op.CHOOSE, x, y, mask))
def where(mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x where the mask (bool) is true, else y, all of one shape: y's bits but for those that differ, times 1 or 0."""
    import torch

    dtype = torch.promote_types(x.dtype, y.dtype)
    x_bits, y_bits = (_bits(z.to(dtype)) for z in (x, y))
    return (x_bits ^ y_bits).mul_(mask.view(torch.uint8)).bitwise_xor_(y_bits).view(dtype)


@_symbols(lambda x, mask: x.made(Op.AND, x, mask))
def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask (bool, of x's shape) is true, else 0: the bit patterns times 1 or 0."""
    import torch

    return (_bits(x) * mask.view(torch.uint8)).view(x.dtype)


@_symbols(lambda x: x.made(Op.AND, 1.0, x.compared(Op.EQUAL, x, 0.0)))
def zeros_of(x: Tensor) -> Tensor:
    """1 where x is 0, else 0, in x's dtype: added to a divisor it makes 0 / 0 zero."""
    import torch

    return torch.eq(x, 0, out=torch.empty_like(x))


@_symbols(lambda x, limit: x.made(Op.AND, 1.0, x > limit))
def above(x: Tensor, limit: float) -> Tensor:
    """1 where x is above the limit, else 0, in x's dtype."""
    import torch

    return torch.gt(x, limit, out=torch.empty_like(x))


@_symbols(lambda x, y: x.made(Op.MAXIMUM, x, y) + 0.0)
def maximum(x: Tensor, y: Tensor | float) -> Tensor:
    """The larger of the two; of two zeros +0."""
    import torch

    return (x.clamp(min=y) if isinstance(y, int | float) else torch.maximum(x, y)).add_(0.0)


@_symbols(lambda x, y: x.made(Op.MINIMUM, x, y) + 0.0)
def minimum(x: Tensor, y: Tensor | float) -> Tensor:
    """The smaller of the two; of two zeros +0."""
    import torch

    return (x.clamp(max=y) if isinstance(y, int | float) else torch.minimum(x, y)).add_(0.0)


@_symbols(lambda size, x: x.made(Op.COPYSIGN, size, x))
def copysign(size: Tensor, x: Tensor) -> Tensor:
    """The magnitudes of one tensor with the signs of another."""
    return size.copysign(x)


@_symbols(lambda x: x.made(Op.COPYSIGN, 1.0, x))
def sign_of(x: Tensor) -> Tensor:
    """1 with the sign of x; 0 has one, too."""
    import torch

    return torch.ones_like(x).copysign_(x)


@_symbols(lambda x: x.made(Op.SQRT, x))
def sqrt(x: Tensor) -> Tensor:
    """The square root, correctly rounded, as torch's own is not on every processor."""
    return x.double().sqrt().to(x.dtype)


def _symbol_power(x: Symbol, exponent: float) -> Symbol:
    """Those powers that torch has special code for, too."""
    match exponent:
        case 0:
            return Symbol(x.tape, x.tape.constant(1.0))
        case 0.5:
            return x.made(Op.SQRT, x)
        case 1:
            return x
        case 2:
            return x * x
    raise UntraceableError(f"no operation for the power {exponent}")


@_symbols(_symbol_power)
def power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent for x >= 0, 0^0 = 1."""
    return sqrt(x) if exponent == 0.5 else x**exponent


def lerp(a: Any, b: Any, share: float) -> Any:
    """a + share (b - a), from the nearer end: exactly a for the share 0, b for 1."""
    return a + share * (b - a) if share < 0.5 else b - (1 - share) * (b - a)


def _bits(x: Tensor) -> Tensor:
    import torch

    return x.view({torch.float32: torch.int32, torch.float64: torch.int64}[x.dtype])
