"""Read portions of a step's inputs as numbers, and say so when they are none."""

from __future__ import annotations

import numpy as np

from sdops.core import native
from sdops.core.plan import Input
from sdops.core.precision import FORMATS, Raw, largest_bits
from sdops.core.source import aligned
from sdops.errors import FormatError


def read_raw(item: Input, first: int, count: int, buffer: memoryview | None = None) -> Raw:
    """Bit patterns of the elements `[first, first + count)`, in `buffer` if they fit, else in fresh memory."""
    raw = FORMATS[item.spec.dtype].raw
    size = np.dtype(raw).itemsize
    if buffer is None or len(buffer) < count * size:
        buffer = aligned(max(count * size, 1))
    data = buffer[: count * size]
    item.source.read_into(item.key, first * size, data)
    return np.frombuffer(data, raw)


def largest_magnitude(raw: Raw, dtype: str) -> int:
    """Bit pattern of the largest magnitude; from the format's `infinity` on, something is infinite or NaN."""
    bounds = native.bounds(raw, dtype)
    return bounds[0] if bounds else largest_bits(raw, dtype)


def nonfinite(item: Input, nan: int, infinite: int) -> FormatError:
    """The error for an input that holds NaN or infinity."""
    found = " and ".join(f"{count} {name}" for count, name in ((nan, "NaN"), (infinite, "infinite")) if count)
    return FormatError(
        f"`{item.key}` of `{item.source.name}` holds {found} {'value' if nan + infinite == 1 else 'values'}",
        hint=f"`sdops verify {item.source.name}` lists all of them; `--exclude '{item.key}'` copies the first model's",
        key=item.key,
        source=item.source.name,
    )
