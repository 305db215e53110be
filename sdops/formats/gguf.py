"""GGUF (ggml-org/llama.cpp, docs/gguf.md): typed metadata, tensors in blocks of few bits per number.

    "GGUF" | u32 version | u64 tensors | u64 fields | fields | tensor infos | padding | data

    field        text key, u32 type, value                    text = u64 length, UTF-8
    tensor info  text name, u32 rank, u64 size per dimension (last first), u32 type, u64 offset in the data

Tensors of the plain types are given as they lie there; those in blocks are dequantised to F32 while they are read
(core.ggml_blocks). ComfyUI-GGUF reshapes some tensors to rows of 256 numbers and keeps the true shape in
`comfy.gguf.orig_shape.NAME`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from sdops.core.ggml import BY_CODE, DECODABLE, PLAIN, TYPES
from sdops.core.source import Place
from sdops.core.spec import Spec
from sdops.errors import FormatError
from sdops.formats._file import InputFile
from sdops.formats._gguf_fields import FieldReader
from sdops.text import count, shorten

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
_VERSIONS = (2, 3)
_RANK_LIMIT = 4
_ALIGNMENT = 32  # unless a field says otherwise
_LEAST_INFO, _LEAST_FIELD = 24, 13  # bytes
_SHOWN = 64  # values of an array in the metadata
_PIECE = 1 << 18  # numbers dequantised at once, a multiple of every block


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor's type, where its bytes begin, and how many there are."""

    kind: str
    position: int
    nbytes: int


class GgufFile:
    """A GGUF file as a Source.

    Attributes:
        name: The file's name.
        path: As it was given.
        files: The path alone.
        warnings: Tensors that cannot be dequantised.
        fd: The open file.
        fingerprint: (size, mtime in ns, inode) when it was opened.
        specs: Tensor name -> Spec in the order of the data; F32 for the types in blocks.
        metadata: The fields as text; long lists are cut.
        fields: The fields as they are: str, int, float, bool, list.
        types: Tensor name -> GGML type.
        offsets: Position in the file of the tensors of plain types.
        forks: Forked processes may read it.
    """

    forks = True

    def __init__(self, path: Path) -> None:
        self._file = InputFile(path)
        try:
            self.fields, infos, data_start = _read_header(self._file)
            self._places, self.specs = _place(self._file, self.fields, infos, data_start)
        except BaseException:
            self._file.close()
            raise
        self.name = path.name
        self.path = path
        self.files = [path]
        self.fd = self._file.fd
        self.fingerprint = self._file.fingerprint
        self.metadata: Mapping[str, str] = {key: _text(value) for key, value in self.fields.items()}
        self.types = {key: place.kind for key, place in self._places.items()}
        self.offsets = {key: place.position for key, place in self._places.items() if place.kind in PLAIN}
        strange = sorted({kind for kind in self.types.values() if kind not in PLAIN and kind not in DECODABLE})
        number = sum(kind in strange for kind in self.types.values())
        self.warnings = [f"{count(number, 'tensor')} of type {', '.join(strange)} cannot be read"] if strange else []

    def piece_bytes(self, key: str) -> int:
        """Portions in which tensors are dequantised, or read."""
        return _PIECE * 4 if key not in self.offsets else 1 << 20

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on, dequantised if need be.

        Raises:
            ChangedError: the file was cut short or written to since it was opened.
            FormatError: its type is one that sdops does not dequantise.
        """
        if key in self.offsets:
            self._file.read_into(self.offsets[key] + start, buffer)
            return
        self._check_type(key)
        place = self._places[key]
        view = buffer.cast("B")
        for begin in range(0, len(view), _PIECE * 4):
            self._dequantise(place, start + begin, view[begin : begin + _PIECE * 4])

    def place(self, key: str) -> Place | None:
        """Where the tensor's bytes lie, if that is on this disk and they are just as `read_into` gives them."""
        return self._file.place(self.offsets[key]) if key in self.offsets else None

    def tally(self) -> None:
        """Nothing is counted."""

    def add(self, tally: None) -> None:
        """Nothing is counted."""

    def check_readable(self) -> None:
        """Refuse a file before work on it begins.

        Raises:
            FormatError: a tensor has a type that sdops does not dequantise.
        """
        for key in self.types:
            self._check_type(key)

    def _check_type(self, key: str) -> None:
        kind = self.types[key]
        if kind not in PLAIN and kind not in DECODABLE:
            raise FormatError(
                f"`{key}` of `{self.path}` is stored as {kind}, which sdops does not dequantise",
                hint=f"take the model in another quantisation: sdops reads {', '.join(sorted(DECODABLE))}",
                key=key,
            )

    def check_unchanged(self) -> None:
        """Raises ChangedError if the file was written to, replaced or removed since it was opened."""
        self._file.check_unchanged()

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def _dequantise(self, place: _Place, start: int, view: memoryview) -> None:
        """Read the blocks that bytes `[start, start + len(view))` of the float32 tensor lie in."""
        import numpy as np

        from sdops.core.ggml_blocks import dequantise

        kind = TYPES[place.kind]
        first, last = start // (4 * kind.block), -(-(start + len(view)) // (4 * kind.block))
        raw = self._file.read(place.position + first * kind.nbytes, (last - first) * kind.nbytes)
        values = dequantise(np.frombuffer(raw, np.uint8), place.kind).astype("<f4", copy=False)
        skip = start - first * 4 * kind.block
        view[:] = values.view(np.uint8).data[skip : skip + len(view)]


def sniff(path: Path, head: bytes) -> bool:
    """The magic word."""
    del path
    return head[:4] == b"GGUF"


def open(path: Path) -> GgufFile:  # noqa: A001 -- the shelf's contract names it
    """Open a file by reading its header.

    Raises:
        SdopsError: the file is missing.
        FormatError: it is damaged, cut short, or of a version or type that sdops does not know.
    """
    return GgufFile(path)


_Info = tuple[str, tuple[int, ...], int, int]  # name, dimensions as stored, type's code, offset


def _read_header(file: InputFile) -> tuple[dict[str, Any], list[_Info], int]:
    """Fields, tensor infos, and where the data begin."""
    reader = FieldReader(file)
    magic, version = reader.bytes(4), reader.unsigned(4)
    if magic != b"GGUF" or version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "big-endian" if swapped in _VERSIONS else f"version {version}"
        raise FormatError(
            f"`{file.path}` is a {what} GGUF file, sdops reads little-endian ones of the versions 2 and 3",
            hint="convert it with a recent llama.cpp",
            path=file.path,
        )
    tensors, fields = reader.unsigned(8), reader.unsigned(8)
    if tensors * _LEAST_INFO + fields * _LEAST_FIELD > file.size:
        reader.refuse(f"it claims {tensors:,} tensors and {fields:,} fields")
    found: dict[str, Any] = {}
    for _ in range(fields):
        key = reader.text()
        if key in found:
            reader.refuse(f"the field `{shorten(key)}` comes twice")
        found[key] = reader.value(reader.unsigned(4))
    infos = [_info(reader) for _ in range(tensors)]
    alignment = found.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 1 << 16 or alignment & (alignment - 1):
        reader.refuse(f"its alignment is {alignment!r:.40}")
    for name, _, _, offset in infos:
        if offset % alignment:
            reader.refuse(f"`{shorten(name)}` begins at {offset:,}, no multiple of {alignment}")
    return found, infos, -(-reader.position // alignment) * alignment


def _info(reader: FieldReader) -> _Info:
    name, rank = reader.text(), reader.unsigned(4)
    if rank > _RANK_LIMIT:
        reader.refuse(f"`{shorten(name)}` has {rank:,} dimensions")
    shape = tuple(reader.unsigned(8) for _ in range(rank))
    return name, shape, reader.unsigned(4), reader.unsigned(8)


def _place(
    file: InputFile, fields: Mapping[str, Any], infos: list[_Info], data_start: int
) -> tuple[dict[str, _Place], dict[str, Spec]]:
    """Places and Specs in the order of the data, once all of them are found to fit together."""
    places: dict[str, _Place] = {}
    specs: dict[str, Spec] = {}
    end, before = data_start, ""
    for name, stored, code, offset in sorted(infos, key=lambda info: info[3]):
        kind = BY_CODE.get(code)
        if name in places:
            _refuse(file, f"`{shorten(name)}` comes twice")
        if kind is None:
            _refuse(file, f"`{shorten(name)}` has the unknown type {code}")
        numel = prod(stored)
        if (stored and stored[0] % kind.block) or numel % kind.block:
            _refuse(
                file, f"`{shorten(name)}` has rows of {stored[0] if stored else 1:,} numbers, no blocks of {kind.name}"
            )
        place = _Place(kind.name, data_start + offset, numel // kind.block * kind.nbytes)
        if place.nbytes and place.position < end:
            _refuse(file, f"`{shorten(name)}` overlaps {f'`{shorten(before)}`' if before else 'the header'}")
        if place.position + place.nbytes > file.size:
            missing = place.position + place.nbytes - file.size
            _refuse(file, f"`{shorten(name)}` ends {missing:,} bytes behind the end of the file")
        places[name] = place
        specs[name] = Spec(PLAIN.get(kind.name, "F32"), _shape(file, fields, name, stored[::-1]))
        end, before = max(end, place.position + place.nbytes), name
    return places, specs


def _shape(file: InputFile, fields: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The true shape of a tensor, which may have been stored in rows of another length."""
    original = fields.get(ORIGINAL_SHAPE + name)
    if original is None:
        return shape
    sound = type(original) is list and all(type(size) is int and size >= 0 for size in original)
    if not sound or len(original) > 16 or prod(original) != prod(shape):
        _refuse(
            file, f"the original shape {shorten(repr(original), 80)} of `{shorten(name)}` is not that of its numbers"
        )
    return tuple(original)


def _text(value: Any) -> str:
    """A field as metadata: texts as they are, all else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) > _SHOWN:
        return f"{json.dumps(value[:_SHOWN])[:-1]}, ... {len(value):,} values]"
    return json.dumps(value)


def _refuse(file: InputFile, what: str) -> NoReturn:
    raise FormatError(
        f"the header of `{file.path}` is damaged: {what}", hint="download or copy the file again", path=file.path
    )
