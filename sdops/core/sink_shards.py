"""Write a model as several files that appear together, or not at all: safetensors shards and their index.

    NAME-00001-of-00003.safetensors ...   NAME.safetensors.index.json = {"metadata": {"total_size": ...}, "weight_map"}

Which tensor goes into which shard is decided as `split_state_dict_into_shards` of huggingface_hub does: in the order
given, a new shard where the next tensor would make it too large.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from sdops.core.sink import FileSink, SafetensorsSink, Sink, check_space
from sdops.core.spec import Spec


class BytesSink(FileSink):
    """A small file whose whole content is known: an index, a configuration, a picture."""

    def __init__(self, path: Path, content: bytes, *, force: bool) -> None:
        self._content = content
        super().__init__(path, {}, {}, force=force)

    def _encode_header(self) -> bytes:
        return self._content


class FilesSink:
    """Several files in the making, which appear together; see `Sink` for the attributes.

    Args:
        parts: The files; the last one gets its name last.
        path: What `commit` returns.
        force: Replace existing files.

    Raises:
        OutputError: all of them do not fit on the disk.
    """

    def __init__(self, parts: Sequence[FileSink], path: Path, *, force: bool) -> None:
        self._files = parts
        self._places = {key: part for part in parts for key in part.specs}
        self._force = force
        self._stack = ExitStack()
        self.path = path
        self.specs: Mapping[str, Spec] = {key: spec for part in parts for key, spec in part.specs.items()}
        self.nbytes = sum(file.nbytes for file in parts)
        self._target = parts[-1].target

    def __enter__(self) -> Self:
        check_space(self._target, self.nbytes)
        with ExitStack() as stack:
            for file in self._files:
                stack.enter_context(file)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def write(self, key: str, start: int, data: memoryview) -> None:
        """Write bytes `[start, start + len(data))` of a tensor. Safe to call from several threads."""
        self._places[key].write(key, start, data)

    def region(self, key: str) -> tuple[int, int] | None:
        """The open file, and where a tensor begins in it."""
        return self._places[key].region(key)

    def start_writeback(self) -> None:
        """Send what was written so far to the disk; returns when it is there."""
        for file in self._files:
            file.start_writeback()

    def commit(self, replace_metadata: Mapping[str, str] | None = None) -> Path:
        """Make all files durable, then give them their names; metadata are replaced where a file has some.

        A failure takes back the names given so far, unless some of them may have been those of replaced files.
        """
        for file in self._files:
            file.seal(replace_metadata if file.metadata else None)
        with ExitStack() as undo:
            for file in self._files:
                file.publish()
                if not self._force:
                    undo.callback(file.target.unlink, missing_ok=True)
            undo.pop_all()
        return self.path


class ShardedSink(FilesSink):
    """Shards and their index in the making.

    Args:
        path: `FOLDER/NAME.safetensors`: what the model would be called as one file; `commit` returns the index.
        shards: Tensors of each shard, as `split` makes them.
        metadata: For the header of every shard.
        force: Replace existing files.

    Raises:
        OutputError: one of the files exists or cannot be written, or all of them do not fit on the disk.
    """

    def __init__(
        self, path: Path, shards: Sequence[Mapping[str, Spec]], metadata: Mapping[str, str], *, force: bool
    ) -> None:
        total = len(shards)
        names = [f"{path.stem}-{number:05d}-of-{total:05d}{path.suffix}" for number in range(1, total + 1)]
        parts = [
            SafetensorsSink(path.with_name(name), specs, metadata, force=force)
            for name, specs in zip(names, shards, strict=True)
        ]
        weight_map = {key: part.path.name for part in parts for key in part.specs}
        size = sum(spec.nbytes for specs in shards for spec in specs.values())
        index = BytesSink(path.with_name(f"{path.name}.index.json"), _index(weight_map, size), force=force)
        super().__init__([*parts, index], index.path, force=force)  # the index last: what it lists is there before it


def split(specs: Mapping[str, Spec], limit: int) -> list[dict[str, Spec]]:
    """Tensors of each shard: in their order, as many as fit into `limit` bytes; a larger one is alone."""
    shards: list[dict[str, Spec]] = []
    shard: dict[str, Spec] = {}
    size = 0
    for key, spec in specs.items():
        if spec.nbytes > limit:
            shards.append({key: spec})
            continue
        if size + spec.nbytes > limit:
            shards.append(shard)
            shard, size = {}, 0
        shard[key] = spec
        size += spec.nbytes
    return [*shards, shard] if shard or not shards else shards


def create_shards(
    path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], *, shard: int, force: bool
) -> Sink:
    """One safetensors file `path` if everything fits into `shard` bytes, or several with an index.

    Raises:
        OutputError: as `SafetensorsSink`.
    """
    shards = split(specs, shard)
    if len(shards) == 1:
        return SafetensorsSink(path, specs, metadata, force=force)
    return ShardedSink(path, shards, metadata, force=force)


def _index(weight_map: Mapping[str, str], size: int) -> bytes:
    """As huggingface_hub writes it, keys sorted."""
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
