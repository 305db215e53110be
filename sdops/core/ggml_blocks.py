"""Block-quantised numbers of GGML: blocks -> float32 and, for the simple types, back.

A block holds a scale d (fp16) and small integers q, x = d q; some types an offset m besides, x = d q + m, or scales
for parts of the block. Layouts and arithmetic are those of ggml-quants.c (ggml-org/llama.cpp), in float32, operation by
operation, so that the results have the same bits as there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sdops.core.casting import cast
from sdops.core.ggml import PLAIN, TYPES
from sdops.core.precision import Raw, Singles

Bytes = NDArray[np.uint8]

FOUR = np.uint8(4)

_CODEBOOK = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def dequantise(data: Bytes, kind: str) -> Singles:
    """Values of whole blocks, in order.

    Args:
        data: The blocks' bytes.
        kind: One of DECODABLE.
    """
    blocks = data.reshape(-1, TYPES[kind].nbytes)
    return _DECODERS[kind](blocks).reshape(-1)


def quantise(values: Singles, kind: str) -> Bytes:
    """Bytes of whole blocks: rounded to nearest, with the scale of the largest magnitude or of the range.

    Args:
        values: A whole number of blocks.
        kind: One of ENCODABLE.
    """
    if kind in PLAIN:
        out: Raw = np.empty(len(values), f"u{TYPES[kind].nbytes}")
        cast(values.view(np.uint32), "F32", out, PLAIN[kind])
        return out.view(np.uint8)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return _ENCODERS[kind](values.reshape(-1, TYPES[kind].block)).reshape(-1)


def _half(blocks: Bytes, start: int) -> Singles:
    """The fp16 number at a place of each block, [n, 1]."""
    values: Singles = np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)
    return values


def _fields(data: Bytes, group: int, width: int) -> Bytes:
    """Unpack `width`-bit fields: of every `group` bytes first all lowest fields, then all second ones ..., [n, -1]."""
    shifts: Bytes = np.arange(0, 8, width, dtype=np.uint8)[:, None]  # [fields, 1]
    parts = data.reshape(len(data), -1, 1, group) >> shifts  # [n, groups, fields, group]
    return (parts & np.uint8((1 << width) - 1)).reshape(len(data), -1)


def _bits(data: Bytes) -> Bytes:
    """32 bits of 4 bytes, lowest first, [n, 32]."""
    return np.unpackbits(np.ascontiguousarray(data), axis=1, bitorder="little")


def _q4_0(blocks: Bytes) -> Singles:
    return _half(blocks, 0) * (_fields(blocks[:, 2:], 16, 4).astype(np.float32) - 8)


def _q4_1(blocks: Bytes) -> Singles:
    return _half(blocks, 0) * _fields(blocks[:, 4:], 16, 4).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Singles:
    q = _fields(blocks[:, 6:], 16, 4) | _bits(blocks[:, 2:6]) << FOUR
    return _half(blocks, 0) * (q.astype(np.float32) - 16)


def _q5_1(blocks: Bytes) -> Singles:
    q = _fields(blocks[:, 8:], 16, 4) | _bits(blocks[:, 4:8]) << FOUR
    return _half(blocks, 0) * q.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Singles:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0)


def _q2_k(blocks: Bytes) -> Singles:
    """16 parts of 16: a nibble of scale and one of offset each, 2 bits per number."""
    scales = blocks[:, :16]
    d, least = _half(blocks, 80), _half(blocks, 82)
    scale = d * (scales & 15).astype(np.float32)  # [n, 16]
    offset = least * (scales >> FOUR).astype(np.float32)
    q = _fields(blocks[:, 16:80], 32, 2).reshape(-1, 16, 16).astype(np.float32)
    return scale[:, :, None] * q - offset[:, :, None]


def _q3_k(blocks: Bytes) -> Singles:
    """16 parts of 16 with 6-bit scales: 2 low bits per number, and one that says whether 4 is taken off."""
    low = _fields(blocks[:, 96:104], 8, 4)  # [n, 16]: low nibbles of bytes 0-7, then high ones
    high = _fields(blocks[:, 104:108], 4, 2)
    scales = (low | high << FOUR).astype(np.float32) - 32
    q = _fields(blocks[:, 32:96], 32, 2).astype(np.float32) - 4 * (
        1 - _fields(blocks[:, :32], 32, 1).astype(np.float32)
    )
    return (_half(blocks, 108) * scales)[:, :, None] * q.reshape(-1, 16, 16)


def _scales_of_k(packed: Bytes) -> tuple[Singles, Singles]:
    """Eight scales and eight offsets of 6 bits each out of 12 bytes, [n, 8] both.

    Bytes 0-3 and 4-7 hold the first four scales and offsets in their low bits; bytes 8-11 the low nibbles of the last
    four scales and offsets, whose high bits are on top of bytes 0-7.
    """
    d, m, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([d & 63, (rest & 15) | (d >> 2 & 48)], axis=1)
    offsets = np.concatenate([m & 63, (rest >> FOUR) | (m >> 2 & 48)], axis=1)
    return scales.astype(np.float32), offsets.astype(np.float32)


def _with_scales_of_k(blocks: Bytes, q: Bytes) -> Singles:
    scales, offsets = _scales_of_k(blocks[:, 4:16])
    scale, offset = _half(blocks, 0) * scales, _half(blocks, 2) * offsets
    return scale[:, :, None] * q.reshape(-1, 8, 32).astype(np.float32) - offset[:, :, None]


def _q4_k(blocks: Bytes) -> Singles:
    return _with_scales_of_k(blocks, _fields(blocks[:, 16:], 32, 4))


def _q5_k(blocks: Bytes) -> Singles:
    return _with_scales_of_k(blocks, _fields(blocks[:, 48:], 32, 4) | _fields(blocks[:, 16:48], 32, 1) << FOUR)


def _q6_k(blocks: Bytes) -> Singles:
    """16 parts of 16 with 8-bit scales: 4 low and 2 high bits per number."""
    q = (_fields(blocks[:, :128], 64, 4) | _fields(blocks[:, 128:192], 32, 2) << FOUR).astype(np.float32) - 32
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return scale[:, :, None] * q.reshape(-1, 16, 16)


def _q8_k(blocks: Bytes) -> Singles:
    d: Singles = np.ascontiguousarray(blocks[:, :4]).view(np.float32)
    return d * blocks[:, 4:260].view(np.int8).astype(np.float32)


def _iq4_nl(blocks: Bytes) -> Singles:
    values: Singles = _half(blocks, 0) * _CODEBOOK[_fields(blocks[:, 2:], 16, 4)]
    return values


def _iq4_xs(blocks: Bytes) -> Singles:
    """8 parts of 32 with 6-bit scales, nibbles that look up numbers."""
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3  # [n, 8]
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> FOUR], axis=2).reshape(-1, 8)
    scale = _half(blocks, 0) * ((low | high << FOUR).astype(np.float32) - 32)
    values: Singles = scale[:, :, None] * _CODEBOOK[_fields(blocks[:, 8:], 16, 4)].reshape(-1, 8, 32)
    return values


_DECODERS: dict[str, Callable[[Bytes], Singles]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "Q8_K": _q8_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
}  # fmt: skip


def _inverse(d: Singles) -> Singles:
    """1 / d, and 0 for 0."""
    result: Singles = np.where(d == 0, np.float32(0), 1 / d).astype(np.float32)
    return result


def _signed_codes(blocks: Singles, levels: int) -> tuple[Singles, Bytes]:
    """Codes 0 .. 2 levels - 1 around `levels`; the number of largest magnitude gets code 0, whatever its sign."""
    at = np.abs(blocks).argmax(axis=1, keepdims=True)
    d: Singles = np.take_along_axis(blocks, at, axis=1) / np.float32(-levels)
    q = np.trunc(blocks * _inverse(d) + np.float32(levels + 0.5)).astype(np.uint8).clip(0, 2 * levels - 1)
    return d, q


def _ranged_codes(blocks: Singles, top: int) -> tuple[Singles, Singles, Bytes]:
    """Codes 0 .. top from the least number to the largest."""
    least = blocks.min(axis=1, keepdims=True)
    d: Singles = (blocks.max(axis=1, keepdims=True) - least) / np.float32(top)
    q = np.trunc((blocks - least) * _inverse(d) + np.float32(0.5)).astype(np.uint8).clip(0, top)
    return d, least, q


def _halves(values: Singles) -> Bytes:
    return values.astype(np.float16).view(np.uint8)


def _nibbles(q: Bytes) -> Bytes:
    """Low nibbles: the first half of the block below, the second half above."""
    return (q[:, :16] & np.uint8(15)) | q[:, 16:] << FOUR


def _fifth_bits(q: Bytes) -> Bytes:
    return np.packbits(q >> FOUR, axis=1, bitorder="little")


def _to_q4_0(blocks: Singles) -> Bytes:
    d, q = _signed_codes(blocks, 8)
    return np.concatenate([_halves(d), _nibbles(q)], axis=1)


def _to_q4_1(blocks: Singles) -> Bytes:
    d, least, q = _ranged_codes(blocks, 15)
    return np.concatenate([_halves(d), _halves(least), _nibbles(q)], axis=1)


def _to_q5_0(blocks: Singles) -> Bytes:
    d, q = _signed_codes(blocks, 16)
    return np.concatenate([_halves(d), _fifth_bits(q), _nibbles(q)], axis=1)


def _to_q5_1(blocks: Singles) -> Bytes:
    d, least, q = _ranged_codes(blocks, 31)
    return np.concatenate([_halves(d), _halves(least), _fifth_bits(q), _nibbles(q)], axis=1)


def _to_q8_0(blocks: Singles) -> Bytes:
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(d)
    whole = np.trunc(scaled)
    q = whole + np.trunc(2 * (scaled - whole))  # ties away from zero
    return np.concatenate([_halves(d), q.astype(np.int8).view(np.uint8)], axis=1)


_ENCODERS: dict[str, Callable[[Singles], Bytes]] = {
    "Q4_0": _to_q4_0, "Q4_1": _to_q4_1, "Q5_0": _to_q5_0, "Q5_1": _to_q5_1, "Q8_0": _to_q8_0,
}  # fmt: skip
