"""Write a GGUF file atomically: typed fields, tensor infos, tensors at multiples of 32 bytes; see formats/gguf.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from struct import pack

from sdops.core.ggml import ENCODABLE, PLAIN, TYPES, packed_bytes
from sdops.core.sink import FileSink
from sdops.core.spec import Spec
from sdops.errors import OutputError

ALIGNMENT = 32
_RANK_LIMIT = 4
_NAME_LIMIT = 127  # bytes; llama.cpp itself allows 63

Field = str | bool | int | float | Sequence[int] | Sequence[str]

# What `general.file_type` says of the type that most tensors have (llama.h, enum llama_ftype).
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}


class GgufSink(FileSink):
    """A GGUF file in the making, its tensors in the order given.

    `specs` are those of the bytes as they are written, U8 of one dimension: `core.ggml_view.Packed` gives them.

    Args:
        path: Where the file shall be. Its folder must exist.
        tensors: Name -> (GGML type, shape).
        fields: Key -> value; non-negative integers become uint32 (or uint64), lists of integers int32.
        force: Replace an existing file.

    Raises:
        OutputError: as `FileSink`, or a name or shape is none that GGUF can hold.
        FormatError: rows of a tensor are no whole number of its type's blocks.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        fields: Mapping[str, Field],
        *,
        force: bool,
    ) -> None:
        self.tensors = dict(tensors)
        specs = {key: Spec("U8", (packed_bytes(kind, shape),)) for key, (kind, shape) in self.tensors.items()}
        for key, (kind, shape) in self.tensors.items():
            _check(key, kind, shape)
        super().__init__(path, specs, fields, force=force)

    def _encode_header(self) -> bytes:
        out = [b"GGUF", pack("<IQQ", 3, len(self.tensors), len(self.metadata))]
        out += [_text(key) + _value(value) for key, value in self.metadata.items()]
        offset = 0
        for key, (kind, shape) in self.tensors.items():
            dimensions = pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            out.append(_text(key) + dimensions + pack("<IQ", TYPES[kind].code, offset))
            offset += _padded(self.specs[key].nbytes)
        header = b"".join(out)
        return header.ljust(_padded(len(header)), b"\0")

    def _place(self, position: int) -> tuple[dict[str, int], int]:
        offsets = {}
        for key, spec in self.specs.items():
            offsets[key] = position
            position += _padded(spec.nbytes)
        return offsets, position


def _check(key: str, kind: str, shape: tuple[int, ...]) -> None:
    if kind not in ENCODABLE and kind not in PLAIN:
        raise OutputError(f"sdops does not write {kind}", hint=f"choose one of {', '.join(sorted(ENCODABLE))}")
    if len(shape) > _RANK_LIMIT or len(key.encode()) > _NAME_LIMIT or not prod(shape):
        raise OutputError(
            f"GGUF cannot hold `{key}` of shape {list(shape)}: at most {_RANK_LIMIT} dimensions, {_NAME_LIMIT} bytes of"
            " name, and some numbers",
            hint="leave this tensor out, or write safetensors",
            key=key,
        )


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode(errors="replace")
    return pack("<Q", len(raw)) + raw


def _value(value: Field) -> bytes:
    """Type code and value."""
    if isinstance(value, str):
        return pack("<I", 8) + _text(value)
    if isinstance(value, bool):
        return pack("<I?", 7, value)
    if isinstance(value, int):
        if value < 0:
            return pack("<Iq", 11, value)
        return pack("<II", 4, value) if value < 1 << 32 else pack("<IQ", 10, value)
    if isinstance(value, float):
        return pack("<If", 6, value)
    if value and all(isinstance(item, str) for item in value):
        return pack("<IIQ", 9, 8, len(value)) + b"".join(_text(str(item)) for item in value)
    return pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
