"""The tensor types of GGML, as GGUF files name them: how many numbers a block holds, in how many bytes. No numpy.

Codes and sizes are those of ggml.h (ggml-org/llama.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass

from sdops.errors import FormatError


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A type: `block` numbers, consecutive in a row, lie in `nbytes` bytes."""

    name: str
    code: int
    block: int
    nbytes: int


# Stored as they are: GGML type -> safetensors dtype.
PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F64", "I8": "I8", "I16": "I16", "I32": "I32", "I64": "I64"}
DECODABLE = frozenset({
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K", "IQ4_NL", "IQ4_XS",
})  # fmt: skip
ENCODABLE = frozenset({"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"})

TYPES = {
    name: GgmlType(name, code, block, nbytes)
    for name, code, block, nbytes in (
        ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22),
        ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34), ("Q8_1", 9, 32, 40), ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110),
        ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176), ("Q6_K", 14, 256, 210), ("Q8_K", 15, 256, 292),
        ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74), ("IQ3_XXS", 18, 256, 98), ("IQ1_S", 19, 256, 50),
        ("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110), ("IQ2_S", 22, 256, 82), ("IQ4_XS", 23, 256, 136),
        ("I8", 24, 1, 1), ("I16", 25, 1, 2), ("I32", 26, 1, 4), ("I64", 27, 1, 8), ("F64", 28, 1, 8),
        ("IQ1_M", 29, 256, 56), ("BF16", 30, 1, 2), ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66),
        ("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36),
    )
}  # fmt: skip
BY_CODE = {kind.code: kind for kind in TYPES.values()}


def packed_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of that type.

    Raises:
        FormatError: its rows are no whole number of blocks.
    """
    row = shape[-1] if shape else 1
    if row % TYPES[kind].block:
        raise FormatError(
            f"rows of {row} numbers are no whole blocks of {TYPES[kind].block}, which {kind} needs",
            hint="keep this tensor in F16",
        )
    numel = 1
    for length in shape:
        numel *= length
    return numel // TYPES[kind].block * TYPES[kind].nbytes
