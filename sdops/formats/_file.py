"""An open input file: regular files only, positioned reads, and notice when the file changes underneath."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from sdops import standin
from sdops.core import files
from sdops.core.source import Place
from sdops.errors import ChangedError, FormatError, SdopsError

HEAD = 4096  # bytes that tell what a file is
_READ_LIMIT = 1 << 30  # of one system call; some systems refuse more than 2^31 - 1

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class InputFile:
    """A regular file, or what it stands in for, open for reading at any position from any thread.

    Args:
        path: As the user gave it; links are followed.

    Attributes:
        path: The same.
        fd: The file descriptor; -1 once closed.
        size: Bytes.
        fingerprint: (size, mtime in ns, inode) when the file was opened.

    Raises:
        SdopsError: the file is missing or must not be read.
        FormatError: the path is not a regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = -1
        try:
            # Without O_NONBLOCK the opening of a named pipe waits for a writer, for ever.
            self.fd = files.open_file(path, "O_RDONLY", "O_NONBLOCK")
            self._status = os.fstat(self.fd)
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from None
        self._elsewhere = standin.find(path)
        self.size = self._status.st_size
        self.fingerprint = _fingerprint(self._status)
        if not stat.S_ISREG(self._status.st_mode):
            self.close()
            raise irregular(path, self._status.st_mode)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on.

        Raises:
            ChangedError: the file was cut short or written to since it was opened.
        """
        view = buffer.cast("B")
        if self._elsewhere is not None:
            self._elsewhere.read_into(offset, view)
            return
        done = 0
        try:
            while done < len(view):
                count = files.read_at(self.fd, view[done : done + _READ_LIMIT], offset + done)
                if count == 0:
                    raise ChangedError(
                        f"`{self.path}` was cut short while it was being read", hint=_AGAIN, path=self.path
                    )
                done += count
        except OSError as error:
            raise self._failing(error) from error
        self._check_open()

    def read(self, offset: int, count: int) -> bytearray:
        """`count` bytes from `offset` on."""
        data = bytearray(count)
        self.read_into(offset, memoryview(data))
        return data

    def place(self, offset: int) -> Place | None:
        """Where compiled code can read from `offset` on; None for what is elsewhere."""
        return Place(self.fd, offset, self._check_open) if self._elsewhere is None else None

    def check_unchanged(self) -> None:
        """See that the file of this name is still the one that was opened, and as it was.

        Raises:
            ChangedError: it was written to, replaced or removed.
        """
        if self._elsewhere is not None:  # a file at a commit does not change
            self._elsewhere.check()
            return
        try:
            self._check(os.stat(self.path))
        except OSError as error:
            raise ChangedError(
                f"`{self.path}` went away while it was being read: {error.strerror}", hint=_AGAIN, path=self.path
            ) from None

    @property
    def is_elsewhere(self) -> bool:
        """Whether every read may be a request to another machine."""
        return self._elsewhere is not None

    def close(self) -> None:
        """Release the file descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        # Sources are composed and dropped like values; as with Python's own files, the last one out closes.
        self.close()

    def _check_open(self) -> None:
        try:
            self._check(os.fstat(self.fd))
        except OSError as error:
            raise self._failing(error) from error

    def _failing(self, error: OSError) -> FormatError:
        return FormatError(
            f"reading `{self.path}` failed: {error.strerror}",
            hint="the disk or the network share may be failing; copy the file elsewhere and try again",
            path=self.path,
        )

    def _check(self, status: os.stat_result) -> None:
        if _fingerprint(status) != self.fingerprint:
            raise ChangedError(f"`{self.path}` changed while it was being read", hint=_AGAIN, path=self.path)


_AGAIN = "wait until nothing writes to it, then run the command again"


def _fingerprint(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def read_head(path: Path) -> bytes:
    """The first bytes of a regular file, at most HEAD.

    Raises:
        SdopsError: as `InputFile`.
    """
    file = InputFile(path)
    try:
        return bytes(file.read(0, min(HEAD, file.size)))
    finally:
        file.close()


def irregular(path: Path, mode: int) -> FormatError:
    """The error for what is neither a file nor a folder that a format knows."""
    if stat.S_ISDIR(mode):
        return FormatError(f"`{path}` is a folder, not a file", hint=f"name a file: `{path}/NAME`", path=path)
    kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
    return FormatError(
        f"`{path}` is {kind}, not a file", hint="write the data to a regular file and give that", path=path
    )


def unreadable(path: Path, error: OSError | ValueError) -> SdopsError:
    """The error for a path that cannot be opened, with names that look alike."""
    number = error.errno if isinstance(error, OSError) else errno.ENOENT  # ValueError: a NUL in the path
    if number not in (errno.ENOENT, errno.ENOTDIR):
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return SdopsError(f"`{path}` cannot be opened: {reason}", hint=f"`ls -l '{path}'` shows why", path=path)
    if os.path.lexists(str(path).replace("\0", "")) and path.is_symlink():
        return SdopsError(
            f"`{path}` is a link to `{os.readlink(path)}`, which does not exist", hint="download the file again"
        )
    close = _similar(path)
    hint = f"did you mean `{close}`?" if close else f"`ls '{path.parent}'` shows what is there"
    return SdopsError(f"there is no file `{path}`", hint=hint, path=path)


def _similar(path: Path) -> Path | None:
    """A neighbour with nearly the same name."""
    from difflib import get_close_matches

    try:
        names = os.listdir(path.parent)
    except (OSError, ValueError):
        return None
    close = get_close_matches(path.name, names, n=1) or [
        name for name in names if Path(name).stem == path.name
    ]  # the ending was left out
    return path.parent / close[0] if close else None
