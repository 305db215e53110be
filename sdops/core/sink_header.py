"""Change the header of a safetensors file: in place where it fits, else in a new file with the same tensor bytes.

In place, the old and the new header first go to a journal beside the file, synchronised to the disk; then the header is
overwritten and synchronised, then the journal is removed. A crash in between leaves either header whole or, if it comes
in the middle of a write of several disk blocks, a mixture of both, from which `recover` makes the old one again. The
tensors are not touched at any time. A new file goes through the sink: it has its name only once it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdops import settings, standin
from sdops.core import files
from sdops.core.sink import FileSink, tag
from sdops.core.spec import Spec
from sdops.errors import ChangedError, OutputError, SdopsError

SPARE = 4096  # a new file's header has room for at least so many bytes more, and ends at a multiple of it
_MAGIC = b"sdops header journal 1\n"
_ELSEWHERE = "`-o FILE` writes a new file instead"


def encode(entries: Mapping[str, Any], metadata: Mapping[str, str], nbytes: int | None = None) -> bytes | None:
    """A header: length, JSON, spaces.

    Args:
        entries: What it says of tensors, as in the file; offsets count from the end of the header.
        metadata: Text -> text.
        nbytes: Its length with the leading 8 bytes; None = as needed, with room to spare.

    Returns:
        The bytes, or None if they do not fit into `nbytes`.
    """
    whole = {**({"__metadata__": dict(metadata)} if metadata else {}), **entries}
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
    if nbytes is None:
        nbytes = -(-(8 + len(text) + SPARE) // SPARE) * SPARE
    if 8 + len(text) > nbytes:
        return None
    return (nbytes - 8).to_bytes(8, "little") + text.ljust(nbytes - 8)


class SameDataSink(FileSink):
    """A safetensors file with a given header, its tensors in a given order without gaps.

    Args:
        path: Where the file shall be.
        specs: All tensors in the order of the data.
        header: As `encode` makes it; its offsets must be those of `specs`.
        force: Replace an existing file.

    Raises:
        OutputError: as `FileSink`.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], header: bytes, *, force: bool) -> None:
        self._given = header
        super().__init__(path, specs, {}, force=force)

    def _encode_header(self) -> bytes:
        return self._given


def replace_header(path: Path, old: bytes, new: bytes) -> None:
    """Overwrite the beginning of a file with a header of the same length.

    Raises:
        OutputError: the file cannot be written to, or is being edited.
        ChangedError: it does not begin with `old`.
    """
    if len(old) != len(new):
        raise ValueError("a header that is replaced in place must keep its length")
    target = Path(os.path.realpath(path))
    with _explained(path), _locked(target) as fd:
        if files.read_bytes(fd, len(old), 0) != old:
            raise ChangedError(f"`{path}` changed while it was being read", hint="run the command again", path=path)
        journal = _write_journal(target, os.fstat(fd).st_size, old, new)
        try:
            _overwrite(fd, new)
        except BaseException:
            _overwrite(fd, old)
            raise
        finally:
            journal.unlink()
            files.sync_folder(target.parent)


def check_place(path: Path) -> None:
    """See that a file may be changed, or replaced by another of its name.

    Files in the Hub's cache are named by their hash and shared by programs: they must stay as they are.

    Raises:
        OutputError: it is on the Hub or in the Hub's cache, or write-protected.
    """
    cache = os.path.realpath(settings.hub_cache_directory())
    if standin.find(path):
        raise OutputError(f"`{path}` is on the Hugging Face Hub", hint="`-o FILE` writes a copy")
    if Path(os.path.realpath(path)).is_relative_to(cache):
        raise OutputError(f"`{path}` is in the cache of the Hugging Face Hub", hint="`-o FILE` writes a copy")
    if not os.access(path, os.W_OK):
        raise OutputError(f"`{path}` is write-protected", hint=f"`chmod u+w {path}` allows changes, {_ELSEWHERE}")


def recover(path: Path) -> bool:
    """Finish what a crash left behind: if the header is half written, make it the old one again.

    Returns:
        Whether there was something to repair.

    Raises:
        OutputError: the file cannot be written to, or is being edited.
    """
    target = Path(os.path.realpath(path))
    journal, draft = journal_of(target), _draft(target)
    if not (journal.exists() or draft.exists()):
        return False
    with _explained(path), _locked(target) as fd:
        found = _read_journal(journal)
        torn = found is not None and os.fstat(fd).st_size == found[0] and _is_mixture(fd, *found[1:])
        if found is not None and torn:
            _overwrite(fd, found[1])
        for leftover in (journal, draft):
            leftover.unlink(missing_ok=True)
        files.sync_folder(target.parent)
    return torn


def _is_mixture(fd: int, old: bytes, new: bytes) -> bool:
    """Whether the file begins with parts of either header: otherwise all is well, or it is another file."""
    now = files.read_bytes(fd, len(old), 0)
    if now in (old, new) or len(now) != len(old):
        return False
    return all(byte in both for byte, *both in zip(now, old, new, strict=True))


def journal_of(target: Path) -> Path:
    """Where the journal of a file is; its name is short, for that of the file may have 255 bytes."""
    return target.parent / f".sdops-{tag(target)}.undo"


def _draft(target: Path) -> Path:
    """Where the journal is written, before it has its name."""
    return journal_of(target).with_suffix(".tmp")


def _write_journal(target: Path, size: int, old: bytes, new: bytes) -> Path:
    """Both headers, durably; the file has its name only once it is complete."""
    content = _MAGIC + size.to_bytes(8, "little") + len(old).to_bytes(8, "little") + old + new
    journal, draft = journal_of(target), _draft(target)
    try:
        with open(draft, "wb") as file:
            file.write(content + hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, journal)
    finally:
        draft.unlink(missing_ok=True)
    files.sync_folder(target.parent)
    return journal


def _read_journal(journal: Path) -> tuple[int, bytes, bytes] | None:
    """Size of the file, its old and its new header; None for something else."""
    data = journal.read_bytes() if journal.exists() else b""
    content, digest = data[:-32], data[-32:]
    if not content.startswith(_MAGIC) or hashlib.sha256(content).digest() != digest:
        return None
    content = content[len(_MAGIC) :]
    length = int.from_bytes(content[8:16], "little")
    return int.from_bytes(content[:8], "little"), content[16 : 16 + length], content[16 + length :]


@contextmanager
def _locked(target: Path) -> Iterator[int]:
    """The file, open for reading and writing; only one sdops at a time may have it so."""
    fd = files.open_file(target, "O_RDWR")
    try:
        alone = True
        with contextlib.suppress(OSError):  # no locks here
            alone = files.try_lock(fd)
        if not alone:
            raise OutputError(f"`{target.name}` is being edited by another command", hint="run the command again")
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except SdopsError:
        raise
    except OSError as error:
        raise OutputError(f"`{path}` cannot be changed in place: {error.strerror}", hint=_ELSEWHERE) from error


def _overwrite(fd: int, data: bytes) -> None:
    files.write_at(fd, memoryview(data), 0)
    os.fsync(fd)
