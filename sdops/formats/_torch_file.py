"""A torch checkpoint as a Source, whichever container its storages lie in."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdops.core.source import Place
from sdops.core.spec import Spec
from sdops.errors import FormatError
from sdops.formats._file import InputFile
from sdops.formats._state_dict import state_dict
from sdops.formats._torch import Tensor

# Strides can repeat numbers, so that a small file means endless tensors. Honest ones repeat a little.
_EXPANSION = 16
_EXPANSION_FREE = 64 << 20
_LINE_LIMIT = 1 << 20
_READ_LIMIT = 256 << 20

Naming = Callable[[Any], Any]


class TorchFile:
    """The named tensors in a checkpoint that torch.save wrote.

    Args:
        file: Open; closed with this Source.
        root: The object in the pickle.
        big_endian: Whether the storages are.
        check: Called with a storage's position before its content is read.

    Attributes:
        name: The file's name.
        path: As it was given.
        files: The path alone.
        warnings: None.
        fd: The open file.
        fingerprint: (size, mtime in ns, inode) when it was opened.
        specs: Tensor name -> Spec in the order of the data.
        metadata: Numbers and texts beside the tensors, such as `global_step`.
        dropped: Names of what else the file holds and this Source leaves out.
        offsets: Position in the file of those tensors whose bytes lie there just as `read_into` gives them.

    Raises:
        FormatError: there are no named tensors, or they are absurdly large.
    """

    def __init__(
        self, file: InputFile, root: Any, *, big_endian: bool = False, check: Callable[[int], None] = lambda _: None
    ) -> None:
        found = state_dict(file.path, root)
        self._file, self._check = file, check
        self._big_endian = big_endian
        self._tensors = dict(sorted(found.tensors.items(), key=lambda item: item[1].position))
        self._gathered: tuple[str, bytes] = ("", b"")
        self._lock = threading.Lock()
        self.name = file.path.name
        self.path: Path = file.path
        self.files = [file.path]
        self.warnings: list[str] = []
        self.fd = file.fd
        self.fingerprint = file.fingerprint
        self.specs: Mapping[str, Spec] = {key: tensor.spec for key, tensor in self._tensors.items()}
        self.metadata: Mapping[str, str] = found.metadata
        self.dropped = found.dropped
        self.offsets = {key: tensor.position for key, tensor in self._tensors.items() if self._is_direct(tensor)}
        self._check_expansion()

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on of the contiguous, little-endian tensor.

        Raises:
            ChangedError: the file was cut short or written to since it was opened.
        """
        self._check(self._tensors[key].storage.position)
        if key in self.offsets:
            self._file.read_into(self.offsets[key] + start, buffer)
            return
        with self._lock:  # pieces of one tensor are asked for one after the other
            if self._gathered[0] != key:
                self._gathered = (key, self._gather(self._tensors[key]))
            data = self._gathered[1]
        buffer.cast("B")[:] = data[start : start + len(buffer.cast("B"))]

    def place(self, key: str) -> Place | None:
        """Where the tensor's bytes lie, if that is on this disk and they are just as `read_into` gives them."""
        return self._file.place(self.offsets[key]) if key in self.offsets else None

    def check_unchanged(self) -> None:
        """Raises ChangedError if the file was written to, replaced or removed since it was opened."""
        self._file.check_unchanged()

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def _is_direct(self, tensor: Tensor) -> bool:
        return tensor.is_contiguous and not (self._big_endian and tensor.item_bytes > 1)

    def _gather(self, tensor: Tensor) -> bytes:
        """The tensor's bytes, put in order."""
        import numpy as np

        size = tensor.item_bytes
        raw = self._file.read(tensor.position, tensor.extent * size)
        word = 4 if tensor.spec.dtype == "C64" else size  # a complex number is two words
        items = np.frombuffer(raw, f"V{size}") if tensor.extent else np.empty(0, f"V{size}")
        strides = tuple(stride * size for stride in tensor.strides)
        if tensor.spec.numel == 0:
            return b""
        whole = np.ascontiguousarray(np.lib.stride_tricks.as_strided(items, tensor.spec.shape, strides))
        if self._big_endian and word > 1:
            return whole.reshape(-1).view(f"u{word}").byteswap().tobytes()
        return whole.tobytes()

    def _check_expansion(self) -> None:
        total = sum(spec.nbytes for spec in self.specs.values())
        if total > _EXPANSION * self._file.size + _EXPANSION_FREE:
            raise FormatError(
                f"`{self.path}` of {self._file.size:,} bytes claims {total:,} bytes of tensors",
                hint="do not use this file: its tensors repeat few numbers without end",
                path=self.path,
            )


class Window(io.RawIOBase):
    """A file as a stream, for the standard library's parsers."""

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        if base + offset < 0:
            raise ValueError("position before the file")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, min(len(view), self._file.size - self._position))]
        self._file.read_into(self._position, view)
        self._position += len(view)
        return len(view)


class Stream(io.BufferedReader):
    """A buffered Window that bounds what a length in the file can make it read."""

    def __init__(self, file: InputFile) -> None:
        super().__init__(Window(file))

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _READ_LIMIT:
            raise ValueError("absurd length")
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        return super().readline(_LINE_LIMIT if size is None or size < 0 else size)
