"""The log of a run: a line of JSON per step. The first line has the settings, others `step` and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from sdops.errors import FormatError, OutputError


class Log:
    """Writes the log; lines behind the step at which a run goes on are removed.

    Args:
        path: The file, made new for a run that begins.
        first: The first line.
        done: Steps that were done before; 0 begins a new log.
    """

    def __init__(self, path: Path, first: Mapping[str, Any], done: int = 0) -> None:
        kept: list[str] = []
        if done and path.is_file():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _is_before(line, done)]
        try:
            self._file: TextIO = path.open("w", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"`{path}` cannot be written: {error.strerror}", hint="choose another `-o`") from error
        self._file.writelines(f"{line}\n" for line in kept)
        if not kept:
            self.write(first)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Add a line."""
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _is_before(line: str, done: int) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:  # cut off when the run was killed
        return False
    return bool(entry.get("step", 0) <= done)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.

    Raises:
        FormatError: it is none.
    """
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise FormatError(f"`{path}` cannot be read: {error.strerror}", hint="name the .jsonl of a run") from error
    except ValueError as error:
        raise FormatError(
            f"`{path}` is no log of `sdops train`", hint="it ends in .jsonl, beside the output"
        ) from error
    if not found or not all(isinstance(entry, dict) for entry in found):
        raise FormatError(f"`{path}` is no log of `sdops train`", hint="it ends in .jsonl, beside the output")
    return found
