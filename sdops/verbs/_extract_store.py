"""Where the tensors of an adapter wait until all ranks are known: a file without a name, seen as a Source."""

from __future__ import annotations

import errno
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdops.core import files
from sdops.core.spec import Spec
from sdops.core.stream import TORCH_DTYPES
from sdops.errors import OutputError
from sdops.text import size


class Place(NamedTuple):
    """Bytes in the file."""

    offset: int
    nbytes: int


class Store:
    """Tensors that were computed, in a temporary file that vanishes with the process.

    Args:
        folder: Where the file is made: the output's folder, which has to have room for them anyway.
        name: How messages call it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._specs: dict[str, Spec] = {}
        self.specs: Mapping[str, Spec] = self._specs
        self.metadata: Mapping[str, str] = {}
        self._places: dict[str, tuple[Place, int]] = {}  # key -> where, and columns if stored transposed
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by close()
        self._end = 0
        self._lock = threading.Lock()

    def put(self, tensor: Tensor) -> Place:
        """Keep a tensor's bytes. Safe to call from several threads.

        Raises:
            OutputError: the disk is full.
        """
        flat = tensor.contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().data
        with self._lock:
            place = Place(self._end, len(data))
            self._end += len(data)
        try:
            files.write_at(self._file.fileno(), data, place.offset)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OutputError(
                f"no space left for the factors of `{self.name}`",
                hint=f"they take {size(self._end)} so far; `-o` on a larger disk, `--max-rank` or `--budget` help",
            ) from error
        return place

    def name_tensor(self, key: str, spec: Spec, place: Place, *, transposed: bool = False) -> None:
        """Give bytes a name and a shape, which may take less than what was put there: the first rows.

        Args:
            key: The name.
            spec: What the tensor is.
            place: What `put` returned.
            transposed: Whether what lies there has its first two dimensions exchanged.
        """
        self._specs[key] = spec
        self._places[key] = place, spec.shape[1] if transposed else 0

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of a tensor."""
        place, columns = self._places[key]
        if not columns:
            _read_at(self._file.fileno(), place.offset + start, buffer)
            return
        spec = self.specs[key]
        data = bytearray(spec.nbytes)
        _read_at(self._file.fileno(), place.offset, memoryview(data))
        raw = np.frombuffer(data, f"u{TORCH_DTYPES[spec.dtype].itemsize}").reshape(columns, -1)
        buffer[:] = np.ascontiguousarray(raw.T).view(np.uint8).reshape(-1).data[start : start + len(buffer)]

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _read_at(fd: int, offset: int, buffer: memoryview) -> None:
    while buffer:
        count = files.read_at(fd, buffer, offset)
        if not count:
            raise EOFError("the temporary file is shorter than what was written to it")
        offset += count
        buffer = buffer[count:]
