"""Read portions of a step's inputs as numbers, and say so when they are none."""

from __future__ import annotations

import numpy as np

from sdops.core.plan import Input
from sdops.core.precision import FORMATS, Raw
from sdops.errors import FormatError


def read_raw(item: Input, first: int, count: int) -> Raw:
    """Bit patterns of the elements `[first, first + count)`, in fresh memory."""
    raw = FORMATS[item.spec.dtype].raw
    size = np.dtype(raw).itemsize
    data = bytearray(count * size)
    item.source.read_into(item.key, first * size, memoryview(data))
    return np.frombuffer(data, raw)


def nonfinite(item: Input, nan: int, infinite: int) -> FormatError:
    """The error for an input that holds NaN or infinity."""
    found = " and ".join(f"{count} {name}" for count, name in ((nan, "NaN"), (infinite, "infinite")) if count)
    return FormatError(
        f"`{item.key}` of `{item.source.name}` holds {found} values",
        hint=f"`sdops verify {item.source.name}` lists all of them; `--exclude '{item.key}'` copies the first model's",
        key=item.key,
        source=item.source.name,
    )
