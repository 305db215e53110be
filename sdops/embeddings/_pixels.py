"""How AUTOMATIC1111's web UI hides an embedding in a picture, so that it survives lossless copies of it.

The embedding is its dict as JSON, tensors as {"TORCHTENSOR": nested lists}, compressed by zlib. Each byte's low half is
kept in the left block of the picture and its high half in the right one, in the low four bits of every channel, hidden
by XOR with a generator of pseudo-random numbers. A column whose low bits are all 0 stands beside each block.

Source: AUTOMATIC1111/stable-diffusion-webui, modules/textual_inversion/image_embedding.py, described in words only.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdops.embeddings._types import Vectors
from sdops.errors import FormatError

Bytes = NDArray[np.uint8]
_LOW, _SHIFT = np.uint8(0x0F), np.uint8(4)
TENSOR = "TORCHTENSOR"
_LIMIT = 256 << 20  # bytes of unpacked JSON: no embedding has that
_HINT = "save the picture with its embedding again, without loss"


def parsed(text: bytes) -> dict[str, Any]:
    """The dict in JSON, its tensors as float32 arrays.

    Raises:
        FormatError: it is none.
    """
    try:
        found = json.loads(text, object_hook=_tensor)
    except (ValueError, RecursionError, TypeError, OverflowError):
        found = None
    if type(found) is not dict:
        raise FormatError("the embedding in the picture is damaged", hint=_HINT)
    return found


def _tensor(entries: dict[str, Any]) -> Any:
    return np.array(entries[TENSOR], np.float32) if TENSOR in entries else entries


def text_of(tree: dict[str, Any]) -> bytes:
    """The other way round; exact for float32, whose values are written as doubles."""
    return json.dumps(tree, default=_lists).encode()


def _lists(value: Vectors) -> dict[str, Any]:
    return {TENSOR: value.values.astype(np.float32).tolist()}


def unpacked(packed: bytes) -> bytes:
    """What zlib compressed; whatever follows it is filling.

    Raises:
        FormatError: it is damaged, or far too large.
    """
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(packed, _LIMIT)
    except zlib.error:
        text = b""
    if not stream.eof:
        raise FormatError("the embedding in the picture is damaged", hint=_HINT)
    return text


def hidden(picture: Bytes) -> dict[str, Any] | None:
    """The dict hidden in a picture [h, w, 3]; None if there is none.

    Raises:
        FormatError: there is something, but damaged.
    """
    low = _cropped(picture) & _LOW
    marks = np.flatnonzero(low.sum(axis=(0, 2), dtype=np.int64) == 0)
    if len(marks) < 2:
        return None
    left, right = _revealed(low[:, : marks[0]]), _revealed(low[:, marks[-1] + 1 :])
    if left.size == 0 or left.size != right.size:
        return None
    return parsed(unpacked(((right << _SHIFT) | left).tobytes()))


def _cropped(picture: Bytes) -> Bytes:
    """Without the black border that editors may have put around."""
    lit = np.all(picture > 0, axis=2)
    rows, columns = np.flatnonzero(lit.any(axis=1)), np.flatnonzero(lit.any(axis=0))
    if not len(rows):
        return picture[:0, :0]
    return picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _revealed(block: Bytes) -> Bytes:
    flat = block.reshape(-1)
    return flat ^ (_generator(flat.size) & _LOW)


def _generator(count: int) -> Bytes:
    """`count` numbers of s <- (1664525 s + 1013904223) mod 2^32 from 0 on, each mod 255.

    A stretch of n steps is one step of another such generator, so the numbers are doubled in number again and again.
    """
    states = np.zeros(1, np.uint64)
    factor, addend = 1664525, 1013904223  # of as many steps as there are states
    states[0] = addend
    while len(states) < count:
        further = (states * np.uint64(factor) + np.uint64(addend)) & np.uint64(0xFFFFFFFF)
        states = np.concatenate([states, further])
        factor, addend = factor * factor & 0xFFFFFFFF, (factor * addend + addend) & 0xFFFFFFFF
    return (states[:count] % np.uint64(255)).astype(np.uint8)


def picture_of(tree: dict[str, Any]) -> Bytes:
    """A picture [h, w, 3] that hides a dict, grey where it says nothing."""
    data = np.frombuffer(zlib.compress(text_of(tree), 9), np.uint8)
    height = max(64, int(np.ceil(np.sqrt(data.size / 3)))) // 64 * 64 + 64
    filled = np.resize(data, -(-data.size // (height * 3)) * height * 3)
    blocks = [_block(half, height) for half in (filled & _LOW, filled >> _SHIFT)]
    gap = np.full((height, max(16, height // 8), 3), 0x80, np.uint8)  # low bits 0, and not black
    return np.concatenate([blocks[0], gap, blocks[1]], axis=1)


def _block(half: Bytes, height: int) -> Bytes:
    """Low bits of a block, on a ground that is never black."""
    low = half ^ (_generator(half.size) & _LOW)
    return (low | np.uint8(0x60)).reshape(height, -1, 3)
