"""Pictures as far as embeddings are in them: the text chunks of PNG, and pixels by Pillow where it is installed."""

from __future__ import annotations

import base64
import binascii
import io
import zlib
from collections.abc import Iterator
from importlib import import_module
from struct import pack
from typing import Any

import numpy as np

from sdops.embeddings._pixels import Bytes
from sdops.errors import FormatError, SdopsError

PNG = b"\x89PNG\r\n\x1a\n"
KEY = b"sd-ti-embedding"
_TEXT_LIMIT = 256 << 20
_PIXEL_LIMIT = 64_000_000


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of a PNG's chunks, up to its end or where it is cut."""
    position = len(PNG)
    while position + 12 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        if position + 12 + size > len(data):
            return
        yield kind, data[position + 8 : position + 8 + size]
        position += 12 + size


def stored(data: bytes) -> bytes | None:
    """The JSON under `sd-ti-embedding` in a PNG; None if it has no such text.

    Raises:
        FormatError: the text is damaged.
    """
    if not data.startswith(PNG):
        return None
    for kind, content in chunks(data):
        key, _, rest = content.partition(b"\0")
        if key == KEY and kind in (b"tEXt", b"zTXt", b"iTXt"):
            return _decoded(_text(kind, rest))
    return None


def _text(kind: bytes, rest: bytes) -> bytes:
    if kind == b"tEXt":
        return rest
    if kind == b"zTXt":
        return _inflated(rest[1:])
    is_packed, text = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    return _inflated(text) if is_packed else text


def _inflated(packed: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        return stream.decompress(packed, _TEXT_LIMIT)
    except zlib.error:
        return b""


def _decoded(text: bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise FormatError("the embedding in the picture is damaged", hint="get the picture again") from None


def pixels(data: bytes) -> Bytes:
    """Red, green and blue [h, w, 3] of a picture of any kind that Pillow reads.

    Raises:
        SdopsError: Pillow is not installed.
        FormatError: it cannot read the picture, or it is absurdly large.
    """
    try:
        library: Any = import_module("PIL.Image")
    except ImportError:
        raise SdopsError(
            "to look for an embedding in the pixels of a picture takes Pillow", hint="`pip install 'sdops[images]'`"
        ) from None
    try:
        with library.open(io.BytesIO(data)) as picture:
            width, height = picture.size
            if width * height > _PIXEL_LIMIT:
                raise ValueError("too large")
            return np.asarray(picture.convert("RGB"), np.uint8)
    except (OSError, ValueError, SyntaxError, EOFError, library.DecompressionBombError) as error:
        raise FormatError(f"the picture cannot be read: {error}", hint="get the picture again") from None


def png(picture: Bytes, text: bytes = b"") -> bytes:
    """A PNG of red, green and blue [h, w, 3], with JSON under `sd-ti-embedding` if there is some."""
    height, width, _ = picture.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), picture.reshape(height, -1)], axis=1)
    parts = [(b"IHDR", pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    if text:
        parts.append((b"tEXt", KEY + b"\0" + base64.b64encode(text)))
    parts += [(b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")]
    return PNG + b"".join(
        pack(">I", len(content)) + kind + content + pack(">I", zlib.crc32(kind + content)) for kind, content in parts
    )
