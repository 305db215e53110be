"""Write a file of tensors atomically: header first, tensors in any order, the final name only when all is well.

The bytes depend on the tensors, their specs and the metadata alone, not on the order or the threads of writing. What
all containers share is here, with safetensors as the first of them. The others have files of their own (`sink_torch`,
`sink_gguf`), and so have outputs of several files (`sink_shards`, `sink_folder`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import threading
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from sdops.core import files
from sdops.core.spec import DTYPE_BITS, Spec
from sdops.errors import OutputError
from sdops.text import size

_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync
_HEADER_LIMIT = 100_000_000
_ORDER = {dtype: rank for rank, dtype in enumerate(DTYPE_BITS)}
_ELSEWHERE = "choose another place with `-o`"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # FAT, some network shares


class Sink(Protocol):
    """An output in the making: a context manager that leaves nothing behind without a `commit`.

    Attributes:
        path: Where it shall be, as the user gave it.
        specs: All tensors to be written, in the order in which they will lie on the disk.
        nbytes: Size of everything.
    """

    path: Path
    specs: Mapping[str, Spec]
    nbytes: int

    def __enter__(self) -> Self:
        """Make the temporary file or folder."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove whatever was not committed."""

    def write(self, key: str, start: int, data: memoryview) -> None:
        """Write bytes `[start, start + len(data))` of a tensor, every byte once. Safe from threads and forks."""

    def region(self, key: str) -> tuple[int, int] | None:
        """The open file, and where a tensor begins in it, for compiled code that writes itself; None if it must not."""

    def start_writeback(self) -> None:
        """Send what was written so far to the disk; returns when it is there."""

    def commit(self, replace_metadata: Mapping[str, str] | None = None) -> Path:
        """Make the output durable and give it its name."""


class FileSink:
    """One file in the making; subclasses say what it looks like. Leaving it with an exception removes every trace.

    Args:
        path: Where the file shall be. Its folder must exist.
        specs: All tensors that will be written, in the order of the file.
        metadata: For the header. Values may be replaced by ones of equal length before `commit`.
        force: Replace an existing file.

    Raises:
        OutputError: the target exists, is not a regular file or cannot be written; when it is entered: it does not fit
            on the disk.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, Any], *, force: bool) -> None:
        self.path = path
        self.target = check_target(path, force=force)
        self.metadata = dict(metadata)
        self.specs = specs
        self._header = self._encode_header()
        self.offsets, self.nbytes = self._place(len(self._header))
        self._force = force
        # the system lets one thread at a time write to a file; others would spin where they can sleep
        self._writing = threading.Lock()
        self._temporary: Path | None = None
        self._fd = -1

    def _encode_header(self) -> bytes:
        """The bytes in front of the tensors."""
        raise NotImplementedError

    def _place(self, position: int) -> tuple[dict[str, int], int]:
        """Where each tensor begins, with a header that ends at `position`, and the file's size."""
        offsets = {}
        for key, spec in self.specs.items():
            offsets[key] = position
            position += spec.nbytes
        return offsets, position

    def _finish(self) -> None:
        """Write what depends on the tensors' bytes."""

    def __enter__(self) -> Self:
        check_space(self.target, self.nbytes)
        remove_leftovers(self.target)
        try:
            while not self._create():
                self._discard()
            files.reserve(self._fd, self.nbytes)
            self._write_at(0, memoryview(self._header))
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError):
                raise self._explained(error) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def write(self, key: str, start: int, data: memoryview) -> None:
        """Write bytes `[start, start + len(data))` of a tensor. Safe to call from several threads."""
        try:
            self._write_at(self.offsets[key] + start, data)
        except OSError as error:
            raise self._explained(error) from error

    def region(self, key: str) -> tuple[int, int] | None:
        """The open file, and where a tensor begins in it; None if it was closed."""
        return (self._fd, self.offsets[key]) if self._fd >= 0 else None

    def start_writeback(self) -> None:
        """Send what was written so far to the disk; returns when it is there."""
        try:
            _sync_data(self._fd)
        except OSError as error:
            raise self._explained(error) from error

    def commit(self, replace_metadata: Mapping[str, str] | None = None) -> Path:
        """Make the file durable and give it its name. Returns the path as the user gave it."""
        self.seal(replace_metadata)
        return self.publish()

    def seal(self, replace_metadata: Mapping[str, str] | None = None) -> None:
        """Complete the temporary file and make it durable."""
        if self._temporary is None:
            raise RuntimeError("commit outside of the with block")
        try:
            if replace_metadata:
                self.metadata.update(replace_metadata)
                header = self._encode_header()
                if len(header) != len(self._header):
                    raise ValueError("replaced metadata must keep its length")
                self._write_at(0, memoryview(header))
            self._finish()
            if self.target.exists():
                os.chmod(
                    self._fd if os.chmod in os.supports_fd else self._temporary, self.target.stat().st_mode & 0o7777
                )
            os.fsync(self._fd)
        except OSError as error:
            raise self._explained(error) from error

    def publish(self) -> Path:
        """Give the sealed file its name."""
        if self._temporary is None:
            raise RuntimeError("publish outside of the with block")
        try:
            if files.HOLDS_NAMES:
                self._close()
            self._link(self._temporary)
            self._discard()
            files.sync_folder(self.target.parent)
        except OSError as error:
            raise self._explained(error) from error
        return self.path

    def _create(self) -> bool:
        """Open and lock a temporary file; the lock tells other runs that this one is alive.

        Returns False if another run took the file for a left-over before it was locked.
        """
        # The name is on record before the file exists, so that a signal in between leaves nothing behind. The finalizer
        # removes the file even if a signal comes just as `__exit__` begins.
        temporary = self.target.parent / f".sdops-{tag(self.target)}-{os.urandom(4).hex()}.tmp"
        self._temporary, self._finalizer = temporary, weakref.finalize(self, _remove, temporary)
        mode = 0o600 if self.target.exists() else 0o666  # what replaces a private file is private while it grows
        self._fd = files.open_file(temporary, "O_RDWR", "O_CREAT", "O_EXCL", mode=mode)
        files.lock(self._fd)
        return temporary.exists()

    def _link(self, temporary: Path) -> None:
        """Give the file its name; without `force` never that of a file which appeared meanwhile."""
        if self._force:
            os.replace(temporary, self.target)
            return
        try:
            os.link(temporary, self.target)  # unlike a renaming it fails where something is
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            check_target(self.path, force=False)
            os.replace(temporary, self.target)

    def _write_at(self, offset: int, data: memoryview) -> None:
        with self._writing:
            files.write_at(self._fd, data, offset)

    def _discard(self) -> None:
        self._close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._finalizer.detach()
            self._temporary = None

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _explained(self, error: OSError) -> OutputError:
        name, needed = f"`{self.path}`", size(self.nbytes)
        if error.errno in _FULL:
            return OutputError(f"no space left while writing {name}", hint=f"it needs {needed}")
        if error.errno == errno.EFBIG:
            return OutputError(
                f"{name} would have {needed}, which is more than a file may have here",
                hint="`ulimit -f` shows the limit of this session; the file system may have one, too (FAT: 4 GB)",
            )
        if error.errno == errno.EEXIST:
            return OutputError(f"{name} appeared while it was being made", hint=_REPLACE)
        if error.errno in _FORBIDDEN:
            return OutputError(f"`{self.target.parent}` cannot be written to: {error.strerror}", hint=_ELSEWHERE)
        return OutputError(f"writing {name} failed: {error.strerror}", hint=_ELSEWHERE)


class SafetensorsSink(FileSink):
    """A safetensors file in the making, its tensors in the order of the reference: widest dtype first, then by name.

    Args and errors as `FileSink`; metadata are text.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], *, force: bool) -> None:
        super().__init__(path, in_safetensors_order(specs), metadata, force=force)

    def _encode_header(self) -> bytes:
        header: dict[str, object] = {"__metadata__": self.metadata} if self.metadata else {}
        position = 0
        for key, spec in self.specs.items():
            header[key] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [position, position + spec.nbytes],
            }
            position += spec.nbytes
        # File names in the metadata need not be text; what is not, becomes a question mark.
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
        text += b" " * (-len(text) % 8)
        if len(text) > _HEADER_LIMIT:
            raise OutputError(
                f"the header of `{self.path}` would have {len(text):,} bytes, safetensors allows {_HEADER_LIMIT:,}",
                hint="leave metadata away with `--metadata none`",
            )
        return len(text).to_bytes(8, "little") + text


def in_safetensors_order(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """Specs as safetensors writes them."""
    return {key: specs[key] for key in sorted(specs, key=lambda key: (_ORDER[specs[key].dtype], key))}


_REPLACE = "`--force` replaces it, `-o` names another file"


def check_target(path: Path, *, force: bool) -> Path:
    """The real path to write to, symbolic links resolved.

    Raises:
        OutputError: the folder is missing or read-only, the target exists (without `force`) or is no regular file.
    """
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        raise OutputError(f"`{path}` is a folder", hint=f"name a file: `-o {path}/NAME.safetensors`")
    if mode and not stat.S_ISREG(mode):
        raise OutputError(f"`{path}` is not a regular file", hint=_ELSEWHERE)
    target = _existing_parent(path)
    if mode and not force:
        raise OutputError(f"`{path}` exists already", hint=_REPLACE)
    return _writable_parent(target)


def check_parent(path: Path) -> Path:
    """The real path to write to, symbolic links resolved, whatever may be there.

    Raises:
        OutputError: the folder above is missing or read-only.
    """
    return _writable_parent(_existing_parent(path))


def _existing_parent(path: Path) -> Path:
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        if path.parts[0] == "hf:":
            raise OutputError(
                f"`{path}` is on the Hub, outputs are written to this disk",
                hint="write a file, then `sdops push FILE OWNER/REPO`",
            )
        missing = target.parent if path.parent.is_dir() else path.parent
        raise OutputError(f"the folder of `{path}` does not exist", hint=f"`mkdir -p {missing}`")
    return target


def _writable_parent(target: Path) -> Path:
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"the folder `{target.parent}` is read-only", hint=_ELSEWHERE)
    return target


def _mode(path: Path) -> int:
    """The mode of what the path leads to, 0 if there is nothing. Asked of the path: `/dev/stdout` has no real one."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise OutputError(f"`{path}` cannot be written to: {error.strerror}", hint=_ELSEWHERE) from error


def check_inputs(path: Path, inputs: Sequence[Path]) -> None:
    """Refuse an output that is one of the inputs, also through links of any kind.

    Raises:
        OutputError: naming the input.
    """
    if not _mode(path):
        return
    for source in inputs:
        if source.exists() and os.path.samefile(path, source):
            raise OutputError(
                f"the output `{path}` is the input `{source}`",
                hint="write to another file with `-o`, inputs stay as they are",
            )


def check_space(target: Path, nbytes: int) -> None:
    """Compare the exact size of the output with the free space and the file size limit.

    Raises:
        OutputError: with both figures.
    """
    free = files.free_space(target.parent) + sum(status.st_blocks * 512 for _, status in _leftovers(target))
    if nbytes > free:
        raise OutputError(
            f"`{target.name}` needs {size(nbytes)}, `{target.parent}` has {size(free)} free",
            hint="choose another place with `-o` (an existing file is only replaced when the new one is complete)",
            needed=nbytes,
            free=free,
        )
    limit = files.size_limit()
    if limit is not None and nbytes > limit:
        raise OutputError(
            f"`{target.name}` needs {size(nbytes)}, this session may write files of {size(limit)}",
            hint="`ulimit -f` shows the limit",
        )


def _remove(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # Windows keeps a file that is open
        temporary.unlink(missing_ok=True)


def tag(target: Path) -> str:
    """What the names of temporary files for one target have in common: short, for a name may have 255 bytes."""
    return f"{zlib.crc32(os.fsencode(target.name)):08x}"


def remove_leftovers(target: Path) -> None:
    """Take away what killed runs left of a file; symbolic links are resolved."""
    for leftover, _ in _leftovers(Path(os.path.realpath(target))):
        leftover.unlink(missing_ok=True)


def _leftovers(target: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Temporary files of killed runs: those for this target that nobody holds a lock on."""
    for path in target.parent.glob(f".sdops-{tag(target)}-*.tmp"):
        try:
            fd = files.open_file(path, "O_RDWR", "O_NOFOLLOW", "O_NONBLOCK")
        except OSError:
            continue  # somebody else's
        try:
            if files.try_lock(fd):  # else a run that is still alive
                yield path, os.fstat(fd)
        except OSError:
            continue  # who knows, without locks
        finally:
            os.close(fd)
