"""8-bit floats: the values of all codes, and rounding to them. No torch.

    F8_E4M3      4 exponent bits, bias 7, no infinity, NaN = S.1111.111, largest 448      (torch.float8_e4m3fn)
    F8_E5M2      5 exponent bits, bias 15, infinity and NaN as in IEEE 754, largest 57344 (torch.float8_e5m2)
    *FNUZ        bias one more, no infinity, NaN = the code of -0; only read

The first two are OCP's OFP8 (Micikevicius et al., FP8 Formats for Deep Learning, 2022).
Rounding is to nearest, ties to even, and saturates: what is too large becomes the largest finite value, and is counted
if it would have been rounded beyond. torch does the same for e4m3fn, but makes infinities in e5m2.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

# dtype -> exponent bits, bias.
_LAYOUTS = {"F8_E4M3": (4, 7), "F8_E5M2": (5, 15), "F8_E4M3FNUZ": (4, 8), "F8_E5M2FNUZ": (5, 16)}
# dtype -> explicit mantissa bits, exponent of the smallest normal number, largest value.
WRITABLE = {"F8_E4M3": (3, -6, 448.0), "F8_E5M2": (2, -14, 57344.0)}


@cache
def fp8_values(dtype: str) -> NDArray[np.float32]:
    """Values of all 256 codes."""
    exponent_bits, bias = _LAYOUTS[dtype]
    mantissa_bits = 7 - exponent_bits
    codes = np.arange(256)
    exponent, mantissa = codes >> mantissa_bits & ((1 << exponent_bits) - 1), codes & ((1 << mantissa_bits) - 1)
    fraction = mantissa / 2.0**mantissa_bits + (exponent > 0)
    values = np.ldexp(fraction, np.maximum(exponent, 1) - bias) * np.where(codes & 0x80, -1.0, 1.0)
    if dtype.endswith("FNUZ"):
        values[0x80] = np.nan
    elif dtype == "F8_E4M3":
        values[[0x7F, 0xFF]] = np.nan
    else:
        values[exponent == 31] = np.where(mantissa[exponent == 31], np.nan, np.inf)
        values[0xFC] = -np.inf
    singles: NDArray[np.float32] = values.astype(np.float32)
    singles.flags.writeable = False
    return singles
