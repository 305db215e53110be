"""JSON as the standard has it, with the freedoms of Python's parser taken back."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from sdops.errors import FormatError
from sdops.formats._file import InputFile
from sdops.text import shorten

SIZE_LIMIT = 100_000_000


def parse(raw: bytes | bytearray) -> dict[str, Any]:
    """An object; no name twice at any level, no NaN, no half characters.

    Raises:
        ValueError: says what is wrong.
    """
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        if b"\\ud" in raw or b"\\uD" in raw:  # an escape may stand for half a character, which no text can hold
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if type(found) is not dict:
        raise ValueError("its JSON is not an object")
    return found


def read(path: Path) -> dict[str, Any]:
    """The object in a small file.

    Raises:
        FormatError: it is no JSON object.
    """
    file = InputFile(path)
    try:
        if file.size > SIZE_LIMIT:
            raise ValueError("it is too large")
        return parse(file.read(0, file.size))
    except ValueError as error:
        raise FormatError(
            f"`{path}` is damaged: {shorten(str(error))}", hint="download or copy the file again", path=path
        ) from None
    finally:
        file.close()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(name for name, after in pairwise(names) if name == after)
        raise ValueError(f"`{shorten(twice)}` stands there twice")
    return found


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")
