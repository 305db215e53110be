"""SHA-256 of a merge's inputs, computed beside the merge where it is not remembered from an earlier run."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sdops import standin
from sdops.core import hashing
from sdops.core.source import aligned
from sdops.formats._file import InputFile
from sdops.hub.reference import cached_reference
from sdops.report import Progress
from sdops.verbs._inputs import Opened, Unwritten

UNKNOWN = "0" * 64  # stands in the header until the input has been read
_BUFFER = 4 << 20
_GRACE_SECONDS = 1.0  # for a thread that is told to stop; a disk that hangs must not hang the rest


def part_record(role: str, part: Opened) -> dict[str, Any]:
    """An input in a recipe: its role, name and hash, or recipe. No folders: they are nobody else's business."""
    record: dict[str, Any] = {"role": role, "file": Path(part.name).name}
    if part.layouts:  # what was read in another layout than it has in the file
        record["layouts"] = {name: list(pair) for name, pair in part.layouts.items()}
    if isinstance(part.origin, Unwritten):
        return {**record, "recipe": part.origin.made}
    if reference := reference_of(part.files):
        record["hub"] = reference
    return {**record, "sha256": UNKNOWN} if part.files else record


def reference_of(files: Sequence[Path]) -> str:
    """Where on the Hub, and at which commit, a model was read from; empty for others. Of several files, their folder's.

    Files in huggingface_hub's cache are told by their place in it, however they came there.
    """
    found = [file.reference if (file := standin.find(path)) else cached_reference(path) for path in files]
    if len(found) <= 1 or "" in found:
        return found[0] if len(found) == 1 else ""
    return "hf://" + os.path.commonpath([reference.removeprefix("hf://") for reference in found])


class Hashes:
    """Hashes all inputs in one thread, next to whoever reads them. Use as a context manager.

    Args:
        parts: The inputs; of merges that have not been written, their inputs.
        enabled: Off hashes nothing.
    """

    def __init__(self, parts: Iterable[Opened], *, enabled: bool) -> None:
        self._parts = [leaf for part in parts for leaf in part.leaves() if leaf.files]
        self._enabled = enabled
        self._found: dict[Path, str] = {}
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._progress = _Counter()

    def __enter__(self) -> Self:
        files = {file for part in self._parts for file in part.files}
        standin.prepare(sorted(files))
        if self._enabled:
            self._found = {file: known for file in files if (known := hashing.cached_sha256(file))}
            self._missing = [InputFile(file) for file in sorted(files - self._found.keys())]
            self._progress.total = sum(file.size for file in self._missing)
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._enabled:
            self._thread.join(_GRACE_SECONDS)

    def wait(self, progress: Progress) -> list[str]:
        """One digest per input that lies on disk, in order. Shows progress if there is much left to do."""
        if not self._enabled:
            return []
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
        lines = "".join(f"{self._found[file]}  {file.name}\n" for file in sorted(part.files))
        return hashlib.sha256(lines.encode()).hexdigest()

    def _work(self) -> None:
        try:
            for file in self._missing:
                self._hash(file)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            self._error = error
        finally:
            for file in self._missing:
                file.close()

    def _hash(self, file: InputFile) -> None:
        """Hash a file, and remember the digest.

        Raises:
            FormatError: it cannot be read.
            ChangedError: it is written to or replaced meanwhile.
        """
        begin, digest, buffer = time.time_ns(), hashlib.sha256(), aligned(_BUFFER)
        for start in range(0, file.size, _BUFFER):
            if self._stop.is_set():
                return
            view = buffer[: file.size - start]
            file.read_into(start, view)
            digest.update(view)
            self._progress.add(len(view))
        file.check_unchanged()
        self._found[file.path] = digest.hexdigest()
        if hashing.settled(file.fingerprint, begin):
            hashing.remember(file.path, file.fingerprint, digest.hexdigest())


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
