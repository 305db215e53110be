"""safetensors: 8 bytes of length N, N bytes of JSON, then the tensors without a gap.

    u64 little-endian N | {"__metadata__": {text: text}, name: {"dtype", "shape", "data_offsets": [begin, end]}} | data

Offsets count from the end of the header. The reader is as strict as the format's text (huggingface/safetensors,
README): no duplicate names, no holes, no overlaps, nothing after the last tensor. Fields of a tensor that the text
does not name are ignored, as the reference does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from shlex import quote
from sys import intern
from typing import Any, NoReturn

from sdops.core.heap import no_garbage_collection
from sdops.core.source import Place
from sdops.core.spec import DTYPE_BITS, Spec
from sdops.errors import FormatError
from sdops.formats._file import HEAD, InputFile
from sdops.formats._guess import is_foreign, unknown
from sdops.formats._json import parse
from sdops.text import shorten, size

HEADER_LIMIT = 100_000_000
RANK_LIMIT = 64
_TOO_LARGE = 1 << 63
_AGAIN = "download or copy the file again"


@dataclass(frozen=True, slots=True)
class Header:
    """What the start of a file says.

    Attributes:
        specs: Tensor name -> Spec in the order of the data.
        metadata: Text -> text.
        offsets: Tensor name -> position of its first byte in the file.
        data_start: Position of the first byte after the header.
        surplus: Bytes after the last tensor; only where they are put up with.
    """

    specs: dict[str, Spec]
    metadata: dict[str, str]
    offsets: dict[str, int]
    data_start: int
    surplus: int = 0


class SafetensorsFile:
    """One safetensors file as a Source; see `Header` for `specs`, `metadata`, `offsets`, `data_start` and `surplus`.

    Args:
        path: As the user gave it.
        lenient: Put up with bytes after the last tensor, as some programs do.

    Attributes:
        name: The file's name.
        path: As it was given.
        fd: The open file.
        fingerprint: (size, mtime in ns, inode) when it was opened.
        files: The path alone.
        warnings: None.
    """

    def __init__(self, path: Path, *, lenient: bool = False) -> None:
        self._file = InputFile(path)
        try:
            header = _read_header(self._file, lenient=lenient)
        except BaseException:
            self._file.close()
            raise
        self.name = path.name
        self.path = path
        self.files = [path]
        self.warnings: list[str] = []
        self.fd = self._file.fd
        self.fingerprint = self._file.fingerprint
        self.specs: Mapping[str, Spec] = header.specs
        self.metadata: Mapping[str, str] = header.metadata
        self.offsets = header.offsets
        self.data_start = header.data_start
        self.surplus = header.surplus

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on.

        Raises:
            ChangedError: the file was cut short or written to since it was opened.
        """
        self._file.read_into(self.offsets[key] + start, buffer)

    def place(self, key: str) -> Place | None:
        """Where the tensor's bytes lie, if that is on this disk."""
        return self._file.place(self.offsets[key])

    def check_unchanged(self) -> None:
        """Raises ChangedError if the file was written to, replaced or removed since it was opened."""
        self._file.check_unchanged()

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def sniff(path: Path, head: bytes) -> bool:
    """A believable length and the brace of the header behind it."""
    del path
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= HEADER_LIMIT


def open(path: Path) -> SafetensorsFile:  # noqa: A001 -- the shelf's contract names it
    """Open a file by reading its header.

    Raises:
        SdopsError: the file is missing.
        FormatError: it is damaged, cut short, or something else.
    """
    return SafetensorsFile(path)


def read_header(path: Path) -> Header:
    """The header alone; the file is closed again.

    Raises:
        FormatError: as `open`.
    """
    file = InputFile(path)
    try:
        return _read_header(file)
    finally:
        file.close()


def _read_header(file: InputFile, *, lenient: bool = False) -> Header:
    head = bytes(file.read(0, min(HEAD, file.size)))
    length = int.from_bytes(head[:8], "little")
    if not sniff(file.path, head):
        if is_foreign(head) or len(head) < 8:
            raise unknown(file.path, head)
        _refuse(file.path, f"it says that its header has {length:,} bytes and does not start with a brace")
    if 8 + length > file.size:
        raise FormatError(
            f"`{file.path}` is cut short: it ends inside its header, {8 + length - file.size:,} bytes before its end",
            hint=_AGAIN,
            path=file.path,
        )
    raw = head[8 : 8 + length] if 8 + length <= len(head) else file.read(8, length)
    with no_garbage_collection():  # which would take half of the time
        return _interpret(file, _parse(file.path, raw), 8 + length, lenient=lenient)


def _refuse(path: Path, what: str) -> NoReturn:
    raise FormatError(f"the header of `{path}` is damaged: {what}", hint=_way_out(path), path=path)


def _way_out(path: Path) -> str:
    """What to do about a damaged header: an edit of sdops that was cut short left the old one beside the file."""
    from sdops.core.sink_header import journal_of

    if journal_of(Path(os.path.realpath(path))).exists():
        return f"an edit was cut short: `sdops meta {quote(str(path))}` puts the old header back"
    return _AGAIN


def _parse(path: Path, raw: bytes | bytearray) -> dict[str, Any]:
    try:
        return parse(raw)
    except ValueError as error:
        _refuse(path, shorten(str(error)))


def _interpret(file: InputFile, header: dict[str, Any], data_start: int, *, lenient: bool) -> Header:
    """Specs and offsets, once all of them are found to fit together."""
    metadata = _metadata(file.path, header.pop("__metadata__", None))
    entries = sorted([_entry(file.path, key, info) for key, info in header.items()], key=_span)
    end = _check_layout(file.path, entries)
    surplus = _check_size(file, data_start + end, lenient=lenient)
    return Header(
        specs={key: spec for key, spec, _, _ in entries},
        metadata=metadata,
        offsets={key: data_start + begin for key, _, begin, _ in entries},
        data_start=data_start,
        surplus=surplus,
    )


def _metadata(path: Path, found: Any) -> dict[str, str]:
    if found is None:
        return {}
    if type(found) is not dict:
        _refuse(path, "its metadata are not an object")
    for name, text in found.items():
        if type(text) is not str:
            _refuse(path, f"the metadata value of `{shorten(name)}` is not a text")
    return found


def _span(entry: tuple[str, Spec, int, int]) -> tuple[int, int]:
    return entry[2:]


def _entry(path: Path, key: str, info: Any) -> tuple[str, Spec, int, int]:
    """Name, spec, begin and end of one tensor."""
    try:
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    except (KeyError, TypeError):
        _refuse(path, f"`{shorten(key)}` needs dtype, shape and data_offsets")
    if type(dtype) is not str or dtype not in DTYPE_BITS:
        _refuse(path, f"`{shorten(key)}` has the unknown dtype {shorten(repr(dtype), 40)}")
    _check_sizes(path, key, "shape", shape)
    _check_sizes(path, key, "offsets", offsets, count=2)
    begin, end = offsets
    if (end - begin) * 8 != prod(shape) * DTYPE_BITS[dtype]:
        _refuse(
            path, f"`{shorten(key)}` has {end - begin:,} bytes, which do not make {dtype}{shorten(repr(shape), 80)}"
        )
    return intern(key), _spec(dtype, tuple(shape)), begin, end  # models of one kind have the same names


@lru_cache(maxsize=1024)
def _spec(dtype: str, shape: tuple[int, ...]) -> Spec:
    """Tensors of one kind share theirs, in all files: there are few sizes, and comparing finds the same object."""
    return Spec(dtype, shape)


def _check_sizes(path: Path, key: str, what: str, numbers: Any, *, count: int | None = None) -> None:
    """A list of integers that fit into 63 bits. A bool is an int elsewhere, not here."""
    sound = type(numbers) is list and (len(numbers) <= RANK_LIMIT if count is None else len(numbers) == count)
    for n in numbers if sound else ():
        if type(n) is not int or not 0 <= n < _TOO_LARGE:
            sound = False
    if not sound:
        _refuse(path, f"`{shorten(key)}` has the impossible {what} {shorten(repr(numbers), 80)}")


def _check_layout(path: Path, entries: Iterable[tuple[str, Spec, int, int]]) -> int:
    """Each tensor begins where the one before ends; returns the end of the last."""
    position, before = 0, ""
    for key, _, begin, end in entries:
        if begin > position:
            _refuse(path, f"{begin - position:,} bytes before `{shorten(key)}` belong to no tensor")
        if begin < position:
            _refuse(path, f"`{shorten(key)}` overlaps `{shorten(before)}`")
        position, before = end, key
    return position


def _check_size(file: InputFile, expected: int, *, lenient: bool) -> int:
    """Refuse a file that is too short or too long; returns how much too long it is."""
    if file.size < expected:
        raise FormatError(
            f"`{file.path}` is cut short: {expected - file.size:,} of {expected:,} bytes are missing"
            f" ({size(expected - file.size)})",
            hint=_AGAIN,
            path=file.path,
            missing=expected - file.size,
        )
    if file.size > expected and not lenient:
        raise FormatError(
            f"`{file.path}` has {file.size - expected:,} bytes after its last tensor",
            hint=f"`sdops fix {quote(str(file.path))}` cuts them off",
            path=file.path,
            extra=file.size - expected,
        )
    return file.size - expected
