"""Write a folder of files, such as a diffusers pipeline, that appears as a whole or not at all.

The files are made inside a temporary folder beside the target, which gets its name when all of them are on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from sdops.core import files
from sdops.core.sink import Sink, check_parent, check_space, in_safetensors_order, tag
from sdops.core.sink_shards import BytesSink, create_shards, split
from sdops.core.spec import Spec
from sdops.errors import OutputError

# What tells a model's folder, which may be replaced, from any other.
_DESCRIPTIONS = ("model_index.json", "config.json")


@dataclass(frozen=True, slots=True)
class Tensors:
    """A safetensors file of the folder.

    Attributes:
        specs: Its tensors, under their names in the file.
        metadata: Its header's text.
        shard: Largest size of a file in bytes; larger ones are cut into shards. 0: never.
    """

    specs: Mapping[str, Spec]
    metadata: Mapping[str, str] = field(default_factory=dict)
    shard: int = 0

    @property
    def shards(self) -> list[dict[str, Spec]]:
        """Tensors of each file."""
        return split(self.specs, self.shard) if self.shard else [dict(self.specs)]


class FolderSink:
    """A folder in the making; see `Sink` for the attributes.

    Tensors are called `SUBFOLDER/NAME` here, as in a diffusers folder that is read; those of a file at the top `NAME`.

    Args:
        path: Where the folder shall be. Its parent must exist.
        files: Path inside the folder (`unet/config.json`) -> its bytes, or the tensors of a safetensors file.
        force: Replace an existing model folder: one that has a model_index.json or a config.json.

    Raises:
        OutputError: the target exists or cannot be written; when it is entered: it does not fit on the disk.
    """

    def __init__(self, path: Path, files: Mapping[str, bytes | Tensors], *, force: bool) -> None:
        self.path = path
        self.target = _check_folder(path, force=force)
        self.specs: Mapping[str, Spec] = {}
        self.nbytes = 0
        for name, content in files.items():
            if isinstance(content, bytes):
                self.nbytes += len(content)
                continue
            for shard in content.shards:
                specs = in_safetensors_order(shard)
                prefix = _prefix(name)
                self.specs = {**self.specs, **{prefix + key: spec for key, spec in specs.items()}}
                self.nbytes += sum(spec.nbytes for spec in specs.values())
        self._files = files
        self._force = force
        self._temporary: Path | None = None
        self._lock = -1
        self._parts: list[Sink] = []
        self._places: dict[str, tuple[Sink, str]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        check_space(self.target, self.nbytes)
        for leftover in _leftovers(self.target):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            self._create()
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
        part, inner = self._places[key]
        part.write(inner, start, data)

    def region(self, key: str) -> tuple[int, int] | None:
        """The open file, and where a tensor begins in it."""
        part, inner = self._places[key]
        return part.region(inner)

    def start_writeback(self) -> None:
        """Send what was written so far to the disk; returns when it is there."""
        for part in self._parts:
            part.start_writeback()

    def commit(self, replace_metadata: Mapping[str, str] | None = None) -> Path:
        """Make everything durable and give the folder its name. Returns the path as the user gave it.

        Args:
            replace_metadata: Values of equal length for the headers of those files that have such metadata.
        """
        if self._temporary is None:
            raise RuntimeError("commit outside of the with block")
        for part in self._parts:
            part.commit(replace_metadata if part.specs else None)
        try:
            folders = {self._temporary / parent for name in self._files for parent in PurePosixPath(name).parents}
            for folder in sorted(folders, reverse=True):
                files.sync_folder(folder)
            publish(self._temporary, self.target, force=self._force)
            self._finalizer.detach()
            self._temporary = None
            files.sync_folder(self.target.parent)
        except OSError as error:
            raise self._explained(error) from error
        return self.path

    def _create(self) -> None:
        """Make the temporary folder, lock it, and begin its files."""
        temporary = self.target.parent / f".sdops-{tag(self.target)}-{os.urandom(4).hex()}.tmp"
        self._temporary = temporary
        self._finalizer = weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)
        temporary.mkdir()
        with contextlib.suppress(PermissionError):  # Windows opens no folders
            self._lock = files.open_file(temporary, "O_RDONLY", "O_DIRECTORY")
            files.lock(self._lock)
        with ExitStack() as stack:
            for name, content in self._files.items():
                file = temporary / name
                file.parent.mkdir(parents=True, exist_ok=True)
                part = self._part(file, content)
                self._parts.append(stack.enter_context(part))
                prefix = _prefix(name)
                self._places |= {prefix + key: (part, key) for key in part.specs}
            self._stack = stack.pop_all()

    def _part(self, file: Path, content: bytes | Tensors) -> Sink:
        if isinstance(content, bytes):
            return BytesSink(file, content, force=False)
        limit = content.shard or sum(spec.nbytes for spec in content.specs.values())
        return create_shards(file, content.specs, content.metadata, shard=limit, force=False)

    def _discard(self) -> None:
        self._stack.close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._finalizer.detach()
            self._temporary = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _explained(self, error: OSError) -> OutputError:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return OutputError(f"`{self.path}` appeared while it was being made", hint=_ANOTHER)
        return OutputError(f"writing the folder `{self.path}` failed: {error.strerror}", hint=_ANOTHER)


def publish(draft: Path, target: Path, *, force: bool) -> None:
    """Give a folder its name; an old one goes when the new one is there.

    Raises:
        OSError: something is there, except an empty folder, and there is no `force`; or it cannot be replaced.
    """
    if not (force and target.exists()):
        os.rename(draft, target)
        return
    old = draft.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(draft, target)
    except BaseException:
        if not target.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


_ANOTHER = "name another folder with `-o`"


def _prefix(name: str) -> str:
    """What stands before the names of a file's tensors in the run: its folder."""
    folder = PurePosixPath(name).parent
    return "" if folder == PurePosixPath() else f"{folder}/"


def _check_folder(path: Path, *, force: bool) -> Path:
    """The real path to write to.

    Raises:
        OutputError: something is there that must not be replaced, or the parent is missing or read-only.
    """
    target = check_parent(path)
    if not os.path.lexists(target):
        return target
    if not target.is_dir():
        raise OutputError(f"`{path}` is a file, the output is a folder", hint=_ANOTHER)
    inside = os.listdir(target)
    if inside and not any(name in inside for name in _DESCRIPTIONS):
        raise OutputError(f"the folder `{path}` exists and holds other things than a model", hint=_ANOTHER)
    if inside and not force:
        raise OutputError(
            f"the folder `{path}` exists already", hint="`--force` replaces it, `-o` names another folder"
        )
    return target


def _leftovers(target: Path) -> Iterator[Path]:
    """Temporary folders of killed runs: those for this target that nobody holds a lock on."""
    for path in target.parent.glob(f".sdops-{tag(target)}-*.tmp"):
        try:
            fd = files.open_file(path, "O_RDONLY", "O_DIRECTORY", "O_NOFOLLOW")
        except OSError:
            continue  # a file, or somebody else's
        try:
            if files.try_lock(fd):  # else a run that is still alive
                yield path
        except OSError:
            continue  # who knows, without locks
        finally:
            os.close(fd)
