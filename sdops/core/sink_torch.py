"""Write a torch checkpoint atomically, without torch: an uncompressed zip archive of a pickle and a member per tensor.

    archive/data.pkl   archive/data/0   archive/data/1 ...   archive/version

Just these members, because AUTOMATIC1111's checker refuses the others that newer versions of torch add. Every member
begins at a multiple of 64 bytes, and nothing in front of a member depends on the tensors' bytes but checksums; so all
places are known beforehand, and checksums follow at the end. The archive is called `archive` whatever the file's name
is: the same tensors make the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import pack
from types import TracebackType
from typing import Any
from zlib import crc32

from sdops.core.checksum import PieceChecksums
from sdops.core.sink import FileSink
from sdops.core.spec import Spec
from sdops.core.torch_pickle import state_dict_pickle, tree_pickle

_ALIGNMENT = 64
_LIMIT = 0xFFFFFFFF  # sizes and offsets from here on need the 64-bit fields
_MANY = 0xFFFF
_UTF8 = 0x0800
_DATE = 0x0021  # 1 January 1980, the first that zip knows


@dataclass(frozen=True, slots=True)
class _Member:
    """A member of the archive: `start` is where its own header begins, `data` where its bytes do."""

    name: bytes
    start: int
    data: int
    size: int

    def header(self, checksum: int) -> bytes:
        """What stands in front of the data, padded up to it."""
        sizes = pack("<HHQQ", 1, 16, self.size, self.size) if self.size >= _LIMIT else b""
        short = min(self.size, _LIMIT)
        padding = self.data - self.start - 30 - len(self.name) - len(sizes) - 4
        extra = sizes + b"FB" + pack("<H", padding) + b"Z" * padding  # torch pads this way
        fixed = pack("<4s5H3I2H", b"PK\3\4", 45 if sizes else 20, _UTF8, 0, 0, _DATE, checksum, short, short,
                     len(self.name), len(extra))  # fmt: skip
        return fixed + self.name + extra

    def entry(self, checksum: int) -> bytes:
        """Its line in the archive's directory."""
        long = [value for value in (self.size, self.size, self.start) if value >= _LIMIT]
        extra = pack(f"<HH{len(long)}Q", 1, 8 * len(long), *long) if long else b""
        short = min(self.size, _LIMIT)
        version = 45 if extra else 20
        return pack("<4s6H3I5H2I", b"PK\1\2", version, version, _UTF8, 0, 0, _DATE, checksum, short, short,
                    len(self.name), len(extra), 0, 0, 0, 0, min(self.start, _LIMIT)) + self.name + extra  # fmt: skip


def _member(name: str, start: int, size: int) -> _Member:
    """A member whose header begins at `start`."""
    raw = f"archive/{name}".encode()
    least = start + 30 + len(raw) + (20 if size >= _LIMIT else 0) + 4
    return _Member(raw, start, -(-least // _ALIGNMENT) * _ALIGNMENT, size)


class TorchSink(FileSink):
    """A `.ckpt`, `.pt` or `.bin` in the making, its tensors in the order given.

    Args:
        path: Where the file shall be. Its folder must exist.
        specs: All tensors that will be written.
        metadata: Text beside the tensors; only with `wrap`.
        wrap: Name under which the tensors lie in the outermost dict; "" puts them there themselves, which is usual for
            diffusers' and transformers' `.bin`.
        force: Replace an existing file.

    Raises:
        OutputError: as `FileSink`, or torch has no dtype for a tensor.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, Spec],
        metadata: Mapping[str, str],
        *,
        wrap: str = "state_dict",
        force: bool,
    ) -> None:
        self._wrap = wrap
        super().__init__(path, dict(specs), metadata, force=force)
        self._numbers = {key: number for number, key in enumerate(self.specs)}
        self._checksums: PieceChecksums | None = None

    def __enter__(self) -> TorchSink:
        self._checksums = PieceChecksums()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._checksums is not None:
            self._checksums.close()
        super().__exit__(kind, error, trace)

    def write(self, key: str, start: int, data: memoryview) -> None:
        """Write bytes `[start, start + len(data))` of a tensor, every byte once."""
        super().write(key, start, data)
        if self._checksums is not None:
            self._checksums.add(self._numbers[key], start, data)

    def region(self, key: str) -> tuple[int, int] | None:
        """None: the archive has a checksum of every byte."""
        del key
        return None

    def _encode_header(self) -> bytes:
        """The pickle as the first member."""
        pickle = self._object()
        self._pickle = _member("data.pkl", 0, len(pickle)), crc32(pickle)
        return self._pickle[0].header(crc32(pickle)) + pickle

    def _object(self) -> bytes:
        """What the file holds, as a pickle."""
        return state_dict_pickle(self.specs, self.metadata, self._wrap)

    def _place(self, position: int) -> tuple[dict[str, int], int]:
        self._members: list[_Member] = []
        for number, spec in enumerate(self.specs.values()):
            self._members.append(_member(f"data/{number}", position, spec.nbytes))
            position = self._members[-1].data + spec.nbytes
        self._end = position
        offsets = {key: member.data for key, member in zip(self.specs, self._members, strict=True)}
        return offsets, position + len(self._tail([0] * len(self._members)))

    def _finish(self) -> None:
        """Headers of the members, and the directory, which hold the checksums."""
        if self._checksums is None:
            raise RuntimeError("commit outside of the with block")
        checksums = self._checksums.combined(spec.nbytes for spec in self.specs.values())
        for member, checksum in zip(self._members, checksums, strict=True):
            self._write_at(member.start, memoryview(member.header(checksum)))
        self._write_at(self._end, memoryview(self._tail(checksums)))

    def _tail(self, checksums: list[int]) -> bytes:
        """The last member, the archive's directory, and where it is."""
        content = b"3\n"
        version = _member("version", self._end, len(content))
        last = version.header(crc32(content)) + content
        members = [self._pickle, *zip(self._members, checksums, strict=True), (version, crc32(content))]
        directory = b"".join(member.entry(checksum) for member, checksum in members)
        return last + directory + _directory_end(len(members), len(directory), self._end + len(last))


class TreeSink(TorchSink):
    """A torch file of any plain values in the making.

    Args:
        path: Where the file shall be. Its folder must exist.
        tree: Dicts, lists, numbers, texts and None, with Leafs for tensors.
        specs: The tensors that the Leafs name.
        force: Replace an existing file.

    Raises:
        OutputError: as `TorchSink`.
    """

    def __init__(self, path: Path, tree: Any, specs: Mapping[str, Spec], *, force: bool) -> None:
        self._tree = tree
        super().__init__(path, specs, {}, force=force)

    def _object(self) -> bytes:
        return tree_pickle(self._tree, {key: number for number, key in enumerate(self.specs)})


def _directory_end(count: int, size: int, start: int) -> bytes:
    """The records at the very end, those of ZIP64 in front of the old one if need be."""
    records = b""
    if count >= _MANY or start >= _LIMIT or size >= _LIMIT:
        records = pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
        records += pack("<4sIQI", b"PK\6\7", 0, start + size, 1)
    few = min(count, _MANY)
    return records + pack("<4s4H2IH", b"PK\5\6", 0, 0, few, few, min(size, _LIMIT), min(start, _LIMIT), 0)
