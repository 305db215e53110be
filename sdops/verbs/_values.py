"""Values of small tensors as Python numbers, and what they tell. No numpy: `inspect` answers before it is imported."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import isfinite, trunc
from typing import Literal

from sdops.core.source import Source, read

_CODES = {
    "I64": "q", "U64": "Q", "I32": "i", "U32": "I", "I16": "h", "U16": "H", "I8": "b", "U8": "B", "BOOL": "B",
    "F64": "d", "F32": "f", "F16": "e",
}  # fmt: skip


def values(source: Source, key: str) -> list[float] | None:
    """All elements of a tensor; None for dtypes that hold no plain numbers (fp8 and narrower)."""
    spec = source.specs[key]
    if spec.dtype not in _CODES and spec.dtype != "BF16":
        return None
    data = bytes(read(source, key))
    if spec.dtype == "BF16":  # the upper half of a float32
        data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    return list(struct.unpack(f"<{spec.numel}{_CODES.get(spec.dtype, 'f')}", data))


@dataclass(frozen=True, slots=True)
class PositionIds:
    """The state of a text encoder's table of positions, which must hold 0, 1, 2, ...

    Attributes:
        key: The tensor's name.
        dtype: Its dtype; only integers are right.
        wrong: How many entries are wrong once cut to integers, as programs do that load them.
        total: How many entries there are.
    """

    key: str
    dtype: str
    wrong: int
    total: int

    @property
    def state(self) -> Literal["ok", "float", "broken"]:
        """`float`: the numbers are right, the dtype is not."""
        if self.wrong:
            return "broken"
        return "ok" if self.dtype.startswith(("I", "U")) else "float"

    def __str__(self) -> str:
        if self.state == "broken":
            return f"broken: {self.wrong} of {self.total} are wrong"
        return "ok" if self.state == "ok" else f"right, but stored as {self.dtype}"


def position_ids(source: Source) -> list[PositionIds]:
    """Every `position_ids` in a file. Merging them as if they were weights breaks them silently."""
    found = []
    for key, spec in source.specs.items():
        if key.rpartition(".")[2] == "position_ids" and 0 < spec.numel <= 4096:
            numbers = values(source, key)
            wrong = sum(not isfinite(x) or trunc(x) != i for i, x in enumerate(numbers or ()))
            found.append(PositionIds(key, spec.dtype, wrong if numbers else spec.numel, spec.numel))
    return found
