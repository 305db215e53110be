"""What is known of a tensor before its values are read: dtype and shape. No torch, no numpy."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

# Bits per element, by safetensors name, in the order in which safetensors writes them (widest first).
DTYPE_BITS: dict[str, int] = {
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F32": 32, "U32": 32, "I32": 32,
    "BF16": 16, "F16": 16, "U16": 16, "I16": 16,
    "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4,
}  # fmt: skip

# Dtypes that merges can do arithmetic on without a scale tensor beside them.
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
FP8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
INTEGERS = frozenset({"U64", "I64", "U32", "I32", "U16", "I16", "I8", "U8", "BOOL"})


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor's dtype (safetensors name) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-d tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the contiguous tensor."""
        return self.numel * DTYPE_BITS[self.dtype] // 8

    @property
    def is_float(self) -> bool:
        """Whether plain arithmetic on the values makes sense."""
        return self.dtype in FLOATS

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"
