"""Write a safetensors file atomically: header first, tensors in any order, the final name only when all is well.

The bytes depend on the tensors, their specs and the metadata alone, not on the order or the threads of writing.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import resource
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from sdops.core.spec import DTYPE_BITS, Spec
from sdops.errors import OutputError

_HEADER_LIMIT = 100_000_000
_ORDER = {dtype: rank for rank, dtype in enumerate(DTYPE_BITS)}


class SafetensorsSink:
    """A safetensors file in the making. Use as a context manager: leaving it with an exception removes every trace.

    Args:
        path: Where the file shall be. Its folder must exist.
        specs: All tensors that will be written.
        metadata: Text for the header. Values may be replaced by ones of equal length before `commit`.
        force: Replace an existing file.

    Raises:
        OutputError: the target exists, is not a regular file, cannot be written, or does not fit on the disk.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], *, force: bool) -> None:
        self.path = path
        self.target = check_target(path, force=force)
        self.metadata = dict(metadata)
        self.specs = {k: specs[k] for k in sorted(specs, key=lambda k: (_ORDER[specs[k].dtype], k))}
        self._header = self._encode_header()
        self.offsets: dict[str, int] = {}
        position = len(self._header)
        for key, spec in self.specs.items():
            self.offsets[key] = position
            position += spec.nbytes
        self.nbytes = position
        check_space(self.target, self.nbytes)
        self._temporary: Path | None = None
        self._fd = -1

    def __enter__(self) -> Self:
        tag = hashlib.sha256(os.fsencode(self.target.name)).hexdigest()[:8]
        _remove_leftovers(self.target.parent, tag)
        # The name is on record before the file exists, so that a signal in between leaves nothing behind.
        self._temporary = self.target.parent / f".sdops-{tag}-{secrets.token_hex(4)}.tmp"
        try:
            self._fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            os.ftruncate(self._fd, self.nbytes)
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

    def start_writeback(self) -> None:
        """Send what was written so far to the disk; returns when it is there."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._explained(error) from error

    def commit(self, replace_metadata: Mapping[str, str] | None = None) -> Path:
        """Make the file durable and give it its name. Returns the path as the user gave it."""
        if self._temporary is None:
            raise RuntimeError("commit outside of the with block")
        try:
            if replace_metadata:
                self.metadata.update(replace_metadata)
                header = self._encode_header()
                if len(header) != len(self._header):
                    raise ValueError("replaced metadata must keep its length")
                self._write_at(0, memoryview(header))
            os.fchmod(self._fd, _mode_for(self.target))
            os.fsync(self._fd)
            os.replace(self._temporary, self.target)
        except OSError as error:
            raise self._explained(error) from error
        self._temporary = None
        _sync_folder(self.target.parent)
        return self.path

    def _write_at(self, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self._fd, data, offset)
            offset += written
            data = data[written:]

    def _discard(self) -> None:
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

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
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > _HEADER_LIMIT:
            raise OutputError(
                f"the header of `{self.path}` would have {len(text):,} bytes, safetensors allows {_HEADER_LIMIT:,}",
                hint="leave metadata away with `--metadata none`",
            )
        return len(text).to_bytes(8, "little") + text

    def _explained(self, error: OSError) -> OutputError:
        name = f"`{self.path}`"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OutputError(f"no space left while writing {name}", hint=f"it needs {self.nbytes / 1e9:.2f} GB")
        if error.errno == errno.EFBIG:
            return OutputError(f"{name} is larger than this session may write ({self.nbytes / 1e9:.2f} GB)",
                               hint="`ulimit -f` shows the limit")  # fmt: skip
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return OutputError(f"`{self.target.parent}` cannot be written to: {error.strerror}",
                               hint="choose another place with `-o`")  # fmt: skip
        return OutputError(f"writing {name} failed: {error.strerror}", hint=None)


def check_target(path: Path, *, force: bool) -> Path:
    """The real path to write to, symbolic links resolved.

    Raises:
        OutputError: the folder is missing or read-only, the target exists (without `force`) or is no regular file.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise OutputError(f"`{path}` is a folder", hint=f"name a file: `-o {path}/NAME.safetensors`")
    if not target.parent.is_dir():
        raise OutputError(f"the folder of `{path}` does not exist", hint=f"`mkdir -p {path.parent}`")
    if target.exists():
        if not target.is_file():
            raise OutputError(f"`{path}` is not a regular file", hint="choose another place with `-o`")
        if not force:
            raise OutputError(f"`{path}` exists already", hint="`--force` replaces it, `-o` names another file")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"the folder `{target.parent}` is read-only", hint="choose another place with `-o`")
    return target


def check_inputs(path: Path, inputs: Sequence[Path]) -> None:
    """Refuse an output that is one of the inputs, also through links of any kind.

    Raises:
        OutputError: naming the input.
    """
    if not path.exists():
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
    free = shutil.disk_usage(target.parent).free
    if nbytes > free:
        raise OutputError(
            f"`{target.name}` needs {nbytes / 1e9:.2f} GB, `{target.parent}` has {free / 1e9:.2f} GB free",
            hint="choose another place with `-o` (an existing file is only replaced when the new one is complete)",
            needed=nbytes,
            free=free,
        )
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and nbytes > limit:
        raise OutputError(
            f"`{target.name}` needs {nbytes / 1e9:.2f} GB, this session may write files of {limit / 1e9:.2f} GB",
            hint="`ulimit -f` shows the limit",
        )


def _mode_for(target: Path) -> int:
    """The old file's mode when it is replaced, else what the umask says."""
    if target.exists():
        return target.stat().st_mode & 0o7777
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _remove_leftovers(folder: Path, tag: str) -> None:
    """Unlink temporary files of killed runs: those for this target that nobody holds a lock on."""
    for leftover in folder.glob(f".sdops-{tag}-*.tmp"):
        try:
            fd = os.open(leftover, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink(missing_ok=True)
        except OSError:
            pass  # a run that is still alive
        finally:
            os.close(fd)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
