"""SHA-256 of model files: of the file and of its tensor data, in one pass, remembered between runs.

The cache holds one small JSON file per model file, replaced by rename, so any number of processes may use
it. An entry counts only while the model file has the size, time and inode that it had when it was read.
A cache that is missing, damaged or read-only costs time, never a command.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import time
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path

from sdops import settings, standin
from sdops.core.source import aligned
from sdops.errors import ChangedError, SdopsError
from sdops.report import Progress, silent

_BUFFER = 4 << 20
_LEGACY = slice(0x100000, 0x110000)  # the bytes of the first web UI's "model hash"
_SETTLE_NS = 50_000_000  # a younger file may change again without a visible change of its time

Fingerprint = tuple[int, int, int]  # size, modification time in ns, inode; as a file's Source has it


@dataclass(frozen=True, slots=True)
class Digests:
    """Hexadecimal SHA-256 digests of a file.

    Attributes:
        sha256: Of the whole file. Its first 10 digits are "AutoV2".
        tensors: Of everything after the safetensors header ("addnet", "AutoV3"); None for other formats.
        legacy: First 8 digits of the SHA-256 of bytes 0x100000 to 0x10FFFF ("AutoV1"), of nothing in files
            up to 1 MiB.
    """

    sha256: str
    tensors: str | None
    legacy: str


def fingerprint(path: str | os.PathLike[str]) -> Fingerprint:
    """What changes when a file's content does: size, modification time in ns, inode."""
    return _mark(os.stat(path))


def sha256(path: str | os.PathLike[str], progress: Progress = silent) -> str:
    """SHA-256 of a file, from the cache if the file has not changed since.

    Raises:
        SdopsError: the file cannot be read.
        ChangedError: it changed meanwhile.
    """
    return cached_sha256(path) or digests(path, progress).sha256


def cached_sha256(path: str | os.PathLike[str]) -> str | None:
    """The remembered SHA-256 of a file, or None. Reads nothing but the cache; the Hub knows those of its files."""
    if (elsewhere := standin.find(path)) is not None:
        return elsewhere.sha256
    return (_recall(path) or {}).get("sha256")


def settled(mark: Fingerprint, begin: int) -> bool:
    """Whether a file was old enough at `begin` (ns) for its next change to show in its fingerprint."""
    return begin - mark[1] > _SETTLE_NS


def remember(path: str | os.PathLike[str], mark: Fingerprint, digest: str) -> None:
    """Keep the SHA-256 of a file that was hashed on the way by; `mark` is its `fingerprint` at that time."""
    _keep(path, mark, {"sha256": digest})


def digests(path: str | os.PathLike[str], progress: Progress = silent, *, fresh: bool = False) -> Digests:
    """All digests of a file in one pass; `fresh` reads the file even if the cache knows them.

    Raises:
        SdopsError: the file cannot be read.
        ChangedError: it changed meanwhile.
    """
    path = standin.real(Path(path))
    known = None if fresh else _recall(path)
    if known and "legacy" in known:
        return Digests(known["sha256"], known.get("tensors"), known["legacy"])
    begin = time.time_ns()
    try:
        found, mark = _read_file(path, progress)
    except OSError as error:
        raise SdopsError(f"`{path}` cannot be read: {error.strerror}", path=path) from error
    if settled(mark, begin):
        _keep(path, mark, {key: value for key, value in asdict(found).items() if value})
    return found


def _read_file(path: str | os.PathLike[str], progress: Progress) -> tuple[Digests, Fingerprint]:
    """Digests of a file that stays as it is meanwhile, and its fingerprint."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would wait for a writer
        raise SdopsError(f"`{path}` is not a file", path=path)
    with open(path, "rb", buffering=0) as file:
        before = _mark(os.fstat(file.fileno()))
        found = _read(file, before[0], Path(path).name, progress)
    if fingerprint(path) != before:
        raise ChangedError(f"`{path}` changed while it was read", hint="run the command again", path=path)
    return found, before


def _read(file: FileIO, nbytes: int, name: str, progress: Progress) -> Digests:
    """One pass with two hashers, each in its own thread: hashlib lets go of the interpreter."""
    from concurrent.futures import ThreadPoolExecutor

    start = _data_start(file, nbytes)
    whole, tensors, legacy = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    buffer, position = aligned(_BUFFER), 0
    with ThreadPoolExecutor(1) as helper, progress(f"hashing {name}", nbytes) as advance:
        while got := file.readinto(buffer):
            chunk = buffer[:got]
            beside = helper.submit(tensors.update, chunk[max(0, (start or 0) - position) :])
            whole.update(chunk)
            legacy.update(chunk[max(0, _LEGACY.start - position) : max(0, _LEGACY.stop - position)])
            beside.result()
            position += got
            advance(got)
    return Digests(whole.hexdigest(), tensors.hexdigest() if start else None, legacy.hexdigest()[:8])


def _data_start(file: FileIO, nbytes: int) -> int | None:
    """Where the tensor data of a safetensors file begin, None for other files. Rewinds the file."""
    head = file.read(9)
    file.seek(0)
    length = int.from_bytes(head[:8], "little")
    return 8 + length if head[8:] == b"{" and 8 + length <= nbytes else None


def _mark(status: os.stat_result) -> Fingerprint:
    return (status.st_size, status.st_mtime_ns, status.st_ino)


def _entry(path: str | os.PathLike[str]) -> Path:
    """The cache file of a model file."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    return settings.cache_directory() / "hashes" / f"{name}.json"


def _recall(path: str | os.PathLike[str]) -> dict[str, str] | None:
    """Digests from the cache by name, if they are sound and the file is the one that they were made from."""
    try:
        entry = json.loads(_entry(path).read_bytes())
        same = tuple(entry["mark"]) == fingerprint(path) and entry["path"] == os.path.realpath(path)
        found = {key: str(entry[key]) for key in ("sha256", "tensors", "legacy") if key in entry}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # RuntimeError: no home directory
        return None
    sound = all(re.fullmatch("[0-9a-f]{8}|[0-9a-f]{64}", digest) for digest in found.values())
    return found if same and sound and "sha256" in found else None


def _keep(path: str | os.PathLike[str], mark: Fingerprint, found: dict[str, str]) -> None:
    import tempfile

    with contextlib.suppress(OSError, RuntimeError):
        entry = _entry(path)
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=entry.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                json.dump({"path": os.path.realpath(path), "mark": mark, **found}, file)
            os.replace(draft, entry)
        except BaseException:
            os.unlink(draft)
            raise
