"""torch.save since version 1.6: an uncompressed zip archive of a pickle and one member per storage.

    NAME/data.pkl, NAME/version, NAME/byteorder, NAME/data/KEY ...

Read without torch and without executing anything (see `_pickle`). The archive is checked entry by entry, because two
zip readers that understand one file differently are how hostile files pass scanners.
"""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path
from struct import error as StructError  # noqa: N812 -- it is a class
from struct import unpack_from
from typing import TYPE_CHECKING, Any, NoReturn
from zlib import crc32

from sdops.errors import FormatError
from sdops.formats._file import InputFile
from sdops.formats._pickle import BYTES_LIMIT, PickleError, refuse
from sdops.formats._torch import Storage, load_object
from sdops.formats._torch_file import Naming, TorchFile, Window

if TYPE_CHECKING:
    from zipfile import ZipInfo

_MEMBER = re.compile(
    r"[^/\0]+/(?P<member>data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
    r"|data/[^/\0]+)"
)
_LOCAL = "<4sHHHHHIIIHH"  # a member's own header, 30 bytes
_LOCAL_BYTES = 30
_ENCRYPTED = 0x1
_ALIGNMENT, _ZIP32 = 64, 0xFFFFFFFF
_DESCRIPTORS = (0, 12, 16, 20, 24)  # bytes behind a member: none, or its size once more


def sniff(path: Path, head: bytes) -> bool:
    """A zip whose first member is one that torch writes (or any, in a folder of the archive)."""
    del path
    if head[:4] != b"PK\3\4" or len(head) < _LOCAL_BYTES:
        return False
    name = head[_LOCAL_BYTES : _LOCAL_BYTES + int.from_bytes(head[26:28], "little")]
    member = name.partition(b"/")[2]
    return member in (b"data.pkl", b"version", b"byteorder", b"constants.pkl") or member.startswith(b"data/")


def open(path: Path) -> TorchFile:  # noqa: A001 -- the shelf's contract names it
    """Open a checkpoint by reading its pickle.

    Raises:
        SdopsError: the file is missing.
        FormatError: it is damaged, hostile, or holds no named tensors.
    """
    return open_named(path, lambda root: root)


def open_named(path: Path, named: Naming) -> TorchFile:
    """As `open`; `named` makes a dict of tensors of the object in the file.

    Raises:
        SdopsError: the file is missing.
        FormatError: it is damaged, hostile, or holds no named tensors.
    """
    file = InputFile(path)
    try:
        members = _members(file, lazy=file.is_elsewhere)
        root, big_endian = named(_read_object(file, members)), _is_big_endian(file, members)
        return TorchFile(file, root, big_endian=big_endian, check=members.check)
    except BaseException:
        file.close()
        raise


def load(path: Path) -> Any:
    """The object in the file as plain values, Tensors and Opaques.

    Raises:
        FormatError: as `open`.
    """
    file = InputFile(path)
    try:
        return _read_object(file, _members(file))
    finally:
        file.close()


class _Members(dict[str, tuple[int, int, int]]):
    """Members by name: position of the first byte, size, CRC.

    A member's position stands in its own header. Of a file elsewhere these would be thousands of requests: `lazy`, a
    storage is expected where torch puts it, and `check` reads its header before its content is read.
    """

    def __init__(self, file: InputFile, *, lazy: bool) -> None:
        super().__init__()
        self._file, self._lazy = file, lazy
        self._expected: dict[int, ZipInfo] = {}

    def start(self, entry: ZipInfo, following: int) -> int:
        """The position of a member's first byte; `following` is that of the next header."""
        start = _expected_start(entry)
        rest = following - start - entry.file_size
        if not self._lazy or "/data/" not in entry.filename or rest not in _DESCRIPTORS:
            return _data_start(self._file, entry)
        self._expected[start] = entry
        return start

    def check(self, position: int) -> None:
        """See that a storage begins there.

        Raises:
            FormatError: its own header says something else.
        """
        entry = self._expected.pop(position, None)
        if entry is not None and _data_start(self._file, entry) != position:
            _damaged(self._file, "its zip archive contradicts itself")


def _expected_start(entry: ZipInfo) -> int:
    """Where torch puts a member's bytes: behind a header that is filled up to a multiple of 64."""
    start = entry.header_offset + _LOCAL_BYTES + len(entry.orig_filename.encode()) + 4
    if max(entry.file_size, entry.header_offset) >= _ZIP32:
        start += 4 + 16 * (entry.file_size >= _ZIP32) + 8 * (entry.header_offset >= _ZIP32)
    return -(-start // _ALIGNMENT) * _ALIGNMENT


def _read_object(file: InputFile, members: _Members) -> Any:
    position, size, crc = members["data.pkl"]
    if size > BYTES_LIMIT:
        _damaged(file, f"its pickle has {size:,} bytes")
    pickle = file.read(position, size)
    if crc not in (0, crc32(pickle)):  # torch can be told to leave it 0
        _damaged(file, "the checksum of its pickle is wrong")

    def find(key: str, dtype: str, nbytes: int) -> Storage:
        start, found, _ = members.get(f"data/{key}", (0, -1, 0))
        if found != nbytes:
            refuse("it is damaged: a storage is missing" if found < 0 else "it is damaged: a storage has another size")
        return Storage(dtype, nbytes, start)

    stream = BytesIO(pickle)
    try:
        root = load_object(stream, find)
        if stream.tell() != size:
            refuse("it is damaged: it goes on behind its end")
    except PickleError as error:
        raise FormatError(f"the pickle of `{file.path}` cannot be read: {error}", hint=_HINT, path=file.path) from None
    return root


_HINT = "get the model from where you trust it, as safetensors if possible"


def _is_big_endian(file: InputFile, members: _Members) -> bool:
    position, size, _ = members.get("byteorder", (0, 0, 0))
    order = bytes(file.read(position, size)) if 0 < size < 16 else b"little"
    if order not in (b"little", b"big"):
        _damaged(file, "its byte order is unknown")
    return order == b"big"


def _members(file: InputFile, *, lazy: bool = False) -> _Members:
    """All members, with or without the folder's name: none twice, none compressed, none overlapping another."""
    entries = _directory(file)
    roots = {entry.filename.partition("/")[0] for entry in entries}
    if any(entry.filename.partition("/")[2].startswith(("code/", "constants.pkl")) for entry in entries):
        raise FormatError(
            f"`{file.path}` is TorchScript: code, not weights",
            hint="export the weights where it runs: `torch.save(model.state_dict(), 'weights.pt')`",
            path=file.path,
        )
    members = _Members(file, lazy=lazy)
    end = 0
    entries.sort(key=lambda entry: entry.header_offset)
    for entry, following in zip(entries, [*(entry.header_offset for entry in entries[1:]), -1], strict=True):
        match = _MEMBER.fullmatch(entry.filename)
        if match is None or len(roots) > 1 or match["member"] in members:
            _damaged(file, "its zip archive holds what torch does not write, or one thing twice")
        if entry.compress_type or entry.compress_size != entry.file_size or entry.flag_bits & _ENCRYPTED:
            _damaged(file, "its zip archive is compressed or encrypted, which torch's never is")
        start = members.start(entry, following)
        if entry.header_offset < end or start + entry.file_size > file.size:
            _damaged(file, "members of its zip archive overlap")
        end = start + entry.file_size
        members[match["member"]] = start, entry.file_size, entry.CRC
    if "data.pkl" not in members:
        _damaged(file, "it holds no pickle")
    return members


def _directory(file: InputFile) -> list[ZipInfo]:
    """The entries of the archive's central directory."""
    from zipfile import BadZipFile, ZipFile

    try:
        with ZipFile(Window(file)) as archive:
            entries = archive.infolist()
    except (BadZipFile, ValueError, NotImplementedError, StructError, OverflowError, IndexError, EOFError):
        _damaged(file, "it is cut short, or its zip archive has no sound directory")
    if not entries or min(entry.header_offset for entry in entries) != 0:
        _damaged(file, "its zip archive begins with foreign bytes")
    return entries


def _data_start(file: InputFile, entry: ZipInfo) -> int:
    """Where a member's bytes begin: behind its own header, which must say what the directory says."""
    if entry.header_offset + _LOCAL_BYTES > file.size:
        _damaged(file, "it is cut short")
    header = file.read(entry.header_offset, min(_LOCAL_BYTES + 1024, file.size - entry.header_offset))
    magic, _, flags, method, *_, name_bytes, extra_bytes = unpack_from(_LOCAL, header)
    name = bytes(header[_LOCAL_BYTES : _LOCAL_BYTES + name_bytes])
    same = flags == entry.flag_bits and method == entry.compress_type
    if magic != b"PK\3\4" or not same or name != entry.orig_filename.encode("utf-8" if flags & 0x800 else "cp437"):
        _damaged(file, "its zip archive contradicts itself")
    return int(entry.header_offset + _LOCAL_BYTES + name_bytes + extra_bytes)


def _damaged(file: InputFile, what: str) -> NoReturn:
    raise FormatError(f"`{file.path}` is damaged: {what}", hint="download or copy the file again", path=file.path)
