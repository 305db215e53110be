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
from math import factorial, inf, log
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from sdops.core.tape import Mask, Op, Symbol, single

if TYPE_CHECKING:
    from torch import Tensor

SQRT_HALF = 0x3F3504F3  # the bits of sqrt(1/2) in float32
MAGIC = 1.5 * 2.0**52  # added to a float64 it leaves the nearest integer in the last bits

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
    match exponent:
        case 0:
            return Symbol(x.tape, x.tape.constant(1.0))
        case 0.5:
            return x.made(Op.SQRT, x)
        case 1:
            return x
        case 2:
            return x * x
    return x.made(Op.POWER, x, exponent)


@_symbols(_symbol_power)
def power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent for x >= 0, 0^0 = 1."""
    import torch

    if exponent in (0, 1, 2) or x.dtype != torch.float32:
        return x**exponent
    if exponent == 0.5:
        return sqrt(x)
    exponent = single(exponent)
    result = _exp2(_log2(x) * exponent)
    result[x == 0], result[x == inf] = (inf, 0.0) if exponent < 0 else (0.0, inf)
    return torch.where(x.isnan(), x, result)


def _symbol_mean(x: Symbol, y: Symbol, alpha: float) -> Symbol:
    if alpha in (0, 0.5, 1):
        return _symbol_power(x, 1 - alpha) * _symbol_power(y, alpha)
    return x.made(Op.GEOMETRIC_MEAN, x, y, alpha)


@_symbols(_symbol_mean)
def geometric_mean(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    """x^(1 - alpha) y^alpha for x, y >= 0 and alpha from 0 to 1, 0^0 = 1."""
    import torch

    if alpha in (0, 0.5, 1) or x.dtype != torch.float32:
        return power(x, 1 - alpha) * power(y, alpha)
    alpha = single(alpha)
    result = _exp2((1 - alpha) * _log2(x) + alpha * _log2(y))
    plain = (x > 0) & (y > 0) & (x < inf) & (y < inf)
    return torch.where(plain, result, x * y)


def _log2(x: Tensor) -> Tensor:
    """log2 x in float64 for float32 x > 0, by single operations as in tape.c: torch's own depends on the processor.

    e + 2 / ln 2 artanh((m - 1) / (m + 1)) for x = 2^e m with 1/2 <= m^2 < 2; the series leaves out less than 1e-12.
    """
    import torch

    tiny = x < 2.0**-126
    bits = torch.where(tiny, x * 2.0**24, x).view(torch.int32)
    shift = (bits - SQRT_HALF) >> 23
    m = (bits - (shift << 23)).view(torch.float32).double()
    t = (m - 1) / (m + 1)
    square, series = t * t, torch.full_like(t, 1 / 13)
    for k in range(11, 0, -2):
        series = series * square + 1 / k
    return (shift - 24 * tiny).double() + (2 / log(2)) * t * series


def _exp2(exponent: Tensor) -> Tensor:
    """2^exponent in float32, likewise: 2^n e^z for the nearest integer n; the series leaves out less than 1e-12."""
    import torch

    exponent = exponent.clamp(-200, 200)  # beyond float32's range
    whole = exponent + MAGIC
    z, series = (exponent - (whole - MAGIC)) * log(2), torch.full_like(exponent, 1 / factorial(10))
    for k in range(9, -1, -1):
        series = series * z + 1 / factorial(k)
    return (series.view(torch.int64) + (whole.view(torch.int64) << 52)).view(torch.float64).float()


def lerp(a: Any, b: Any, share: float) -> Any:
    """a + share (b - a), from the nearer end: exactly a for the share 0, b for 1."""
    return a + share * (b - a) if share < 0.5 else b - (1 - share) * (b - a)


def _bits(x: Tensor) -> Tensor:
    import torch

    return x.view({torch.float32: torch.int32, torch.float64: torch.int64}[x.dtype])
