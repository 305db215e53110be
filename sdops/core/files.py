"""What systems do differently with open files: reads and writes at a position, locks, limits.

POSIX has calls that take a position, so that threads share a file descriptor without moving it under each other.
Windows has none: there a lock is held around moving and reading. Nor does Windows let go of the name of a file that
is open, which is why `HOLDS_NAMES` makes the sinks close a file before they rename it.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import sys
import threading
from collections import defaultdict
from types import ModuleType


def _on_posix(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


fcntl, resource = _on_posix("fcntl"), _on_posix("resource")
HOLDS_NAMES = fcntl is None
_FLAGS = {name: getattr(os, name, 0) for name in ("O_CLOEXEC", "O_BINARY", "O_NOINHERIT")}
_ALWAYS = sum(_FLAGS.values())
_LARGE = 256 << 20
_turns: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)  # file descriptor -> who may move it


def open_file(path: str | os.PathLike[str], *flags: str, mode: int = 0o666) -> int:
    """A file descriptor that children do not inherit, of bytes as they are.

    Args:
        path: What to open.
        flags: Names as in `os`, `"O_RDWR"`; those that a system lacks are left out.
        mode: Permissions of a new file.
    """
    return os.open(path, _ALWAYS | sum(getattr(os, flag, 0) for flag in flags), mode)


def reserve(fd: int, nbytes: int) -> None:
    """Give the file its size, and a large one its place on the disk at once, where the system can do that.

    Otherwise places are looked for while data are written, and writers wait for each other.

    Raises:
        OSError: there is no space.
    """
    os.ftruncate(fd, nbytes)
    if nbytes < _LARGE or sys.platform != "linux":
        return
    import ctypes  # os.posix_fallocate writes to every block where the file system cannot do it

    library = ctypes.CDLL(None, use_errno=True)
    allocate = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if allocate is None:
        return
    for start in range(0, nbytes, _LARGE):  # in parts: in memory it takes seconds, and no signal is heeded meanwhile
        if allocate(fd, 0, ctypes.c_int64(start), ctypes.c_int64(min(_LARGE, nbytes - start))):
            number = ctypes.get_errno()
            if number in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(number, os.strerror(number))
            return


def read_at(fd: int, buffer: memoryview, position: int) -> int:
    """Fill the buffer from a position of the file on; returns the number of bytes, fewer at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], position)
    with _turns[fd], io.FileIO(fd, "rb", closefd=False) as file:
        file.seek(position)
        return file.readinto(buffer)


def read_bytes(fd: int, count: int, position: int) -> bytes:
    """Up to `count` bytes from a position of the file on."""
    data = bytearray(count)
    done = 0
    while done < count and (part := read_at(fd, memoryview(data)[done:], position + done)):
        done += part
    return bytes(data[:done])


def write_at(fd: int, data: memoryview, position: int) -> None:
    """Write everything to a position of the file."""
    while data:
        written = os.pwrite(fd, data, position) if hasattr(os, "pwrite") else _move_and_write(fd, data, position)
        position += written
        data = data[written:]


def _move_and_write(fd: int, data: memoryview, position: int) -> int:
    with _turns[fd]:
        os.lseek(fd, position, os.SEEK_SET)
        return os.write(fd, data)


def lock(fd: int) -> None:
    """Take the file until it is closed, if the file system has locks; waits for those that hold it."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a network share without locks
            fcntl.flock(fd, fcntl.LOCK_EX)


def try_lock(fd: int) -> bool:
    """Take the file until it is closed; False if somebody has it.

    Raises:
        OSError: the file system has no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def size_limit() -> int | None:
    """How many bytes a file of this session may have, None where there is no limit."""
    if resource is None:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if limit == resource.RLIM_INFINITY else limit


def free_space(folder: str | os.PathLike[str]) -> int:
    """How many bytes this user may still write there."""
    if hasattr(os, "statvfs"):
        system = os.statvfs(folder)
        return system.f_bavail * system.f_frsize
    import shutil  # which brings all of Python's compression along

    return shutil.disk_usage(folder).free


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make a new name durable, where a folder can be synchronised."""
    try:
        fd = open_file(folder, "O_RDONLY", "O_DIRECTORY")
    except OSError:
        return  # it may be written to, but not read; Windows opens no folders
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)
