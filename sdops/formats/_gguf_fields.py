"""The typed values in a GGUF header, one after the other; what a length claims is checked before it is believed."""

from __future__ import annotations

from struct import calcsize, unpack
from typing import Any, NoReturn

from sdops.errors import FormatError
from sdops.formats._file import InputFile
from sdops.text import shorten

# Type code -> struct format; 8 is text, 9 a list.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_CHUNK = 1 << 16
_TEXT_LIMIT = 1 << 24
_LIST_LIMIT = 1 << 24
_DEPTH_LIMIT = 4


class FieldReader:
    """A position in a file's header.

    Attributes:
        position: Of the next byte.
    """

    def __init__(self, file: InputFile) -> None:
        self.position = 0
        self._file = file
        self._chunk = b""
        self._start = 0  # of the chunk in the file

    def bytes(self, size: int) -> bytes:
        """The next bytes."""
        if size > self._file.size - self.position:
            self.refuse("it ends inside its header")
        begin = self.position - self._start
        if begin + size > len(self._chunk):
            wanted = min(max(size, _CHUNK), self._file.size - self.position)
            self._chunk = bytes(self._file.read(self.position, wanted))
            self._start, begin = self.position, 0
        self.position += size
        return self._chunk[begin : begin + size]

    def unsigned(self, size: int) -> int:
        """An unsigned integer of so many bytes."""
        return int.from_bytes(self.bytes(size), "little")

    def text(self) -> str:
        """A text with its length in front."""
        size = self.unsigned(8)
        if size > _TEXT_LIMIT:
            self.refuse(f"it holds a text of {size:,} bytes")
        raw = self.bytes(size)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.refuse(f"it holds a text that is none: {shorten(repr(raw), 80)}")

    def value(self, code: int, depth: int = 0) -> Any:
        """A value of a type: int, float, bool, str or list."""
        if code == _TEXT:
            return self.text()
        if code == _LIST:
            return self._list(depth)
        if code not in _NUMBERS:
            self.refuse(f"it holds a field of the unknown type {code}")
        return self._numbers(code, 1)[0]

    def _list(self, depth: int) -> list[Any]:
        if depth == _DEPTH_LIMIT:
            self.refuse("it holds lists in lists without end")
        code, count = self.unsigned(4), self.unsigned(8)
        least = calcsize(_NUMBERS[code]) if code in _NUMBERS else 8
        if count > _LIST_LIMIT or count * least > self._file.size - self.position:
            self.refuse(f"it holds a list of {count:,} values")
        if code in _NUMBERS:
            return self._numbers(code, count)
        return [self.value(code, depth + 1) for _ in range(count)]

    def _numbers(self, code: int, count: int) -> list[Any]:
        letter = _NUMBERS[code]
        return list(unpack(f"<{count}{letter}", self.bytes(count * calcsize(f"<{letter}"))))

    def refuse(self, what: str) -> NoReturn:
        """Raises FormatError."""
        raise FormatError(
            f"the header of `{self._file.path}` is damaged: {what}",
            hint="download or copy the file again",
            path=self._file.path,
        )
