"""SHA-256 of a merge's inputs, computed beside the merge where it is not remembered from an earlier run."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from sdops.core import hashing
from sdops.report import Progress
from sdops.verbs._inputs import Opened

UNKNOWN = "0" * 64  # stands in the header until the input has been read
_BUFFER = 4 << 20


def part_record(role: str, part: Opened) -> dict[str, str]:
    """An input in a recipe: its role, name and hash. No folders: they are nobody else's business."""
    return {"role": role, "file": Path(part.name).name, "sha256": UNKNOWN}


class Hashes:
    """Hashes all inputs in one thread, next to whoever reads them. Use as a context manager.

    Args:
        parts: The inputs.
        enabled: Off leaves the placeholders.
    """

    def __init__(self, parts: Iterable[Opened], *, enabled: bool) -> None:
        self._parts = list(parts)
        self._enabled = enabled
        self._found: dict[Path, str] = {}
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._progress = _Counter()

    def __enter__(self) -> Self:
        files = {file for part in self._parts for file in part.files}
        if self._enabled:
            self._found = {file: known for file in files if (known := hashing.cached_sha256(file))}
            self._missing = sorted(files - self._found.keys())
            self._progress.total = sum(file.stat().st_size for file in self._missing)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def wait(self, progress: Progress) -> list[str]:
        """One digest per input, in order. Shows progress if there is much left to do."""
        if not self._enabled:
            return [UNKNOWN] * len(self._parts)
        if self._thread.is_alive():
            with progress("hashing the inputs", self._progress.total) as advance:
                self._progress.attach(advance)
                self._thread.join()
        if self._error is not None:
            raise self._error
        return [self._digest(part) for part in self._parts]

    def _digest(self, part: Opened) -> str:
        """A file's own hash; of several files the hash of the list that `sha256sum` would print."""
        if len(part.files) == 1:
            return self._found[part.files[0]]
        if not part.files:
            return UNKNOWN
        lines = "".join(f"{self._found[file]}  {file.name}\n" for file in sorted(part.files))
        return hashlib.sha256(lines.encode()).hexdigest()

    def _work(self) -> None:
        try:
            for file in self._missing:
                mark, digest = hashing.fingerprint(file), hashlib.sha256()
                buffer = memoryview(bytearray(_BUFFER))
                with file.open("rb", buffering=0) as stream:
                    while got := stream.readinto(buffer):
                        if self._stop.is_set():
                            return
                        digest.update(buffer[:got])
                        self._progress.add(got)
                self._found[file] = digest.hexdigest()
                if hashing.fingerprint(file) == mark:
                    hashing.remember(file, mark, self._found[file])
        except OSError as error:
            self._error = error


class _Counter:
    """Counts bytes; once somebody watches, passes them on."""

    def __init__(self) -> None:
        self.total = 0
        self._done = 0
        self._advance: Callable[[int], None] | None = None

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        if self._advance is not None:
            self._advance(nbytes)

    def attach(self, advance: Callable[[int], None]) -> None:
        advance(self._done)
        self._advance = advance
