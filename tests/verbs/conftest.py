from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdops.core.spec import DTYPE_BITS, Spec

Tensors = Mapping[str, tuple[str, Any]]  # name -> (dtype, numpy array whose bytes are the tensor's)


class MemorySource:
    """Tensors given as arrays of bytes or numbers."""

    name = "memory"

    def __init__(self, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
        self.metadata = dict(metadata or {})
        self.data = {key: np.ascontiguousarray(array).tobytes() for key, (_, array) in tensors.items()}
        self.specs = {
            key: Spec(dtype, (len(self.data[key]) * 8 // DTYPE_BITS[dtype],)) for key, (dtype, _) in tensors.items()
        }

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        buffer[:] = self.data[key][start : start + len(buffer)]

    def close(self) -> None:
        pass


@pytest.fixture
def memory() -> type[MemorySource]:
    return MemorySource


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a safetensors file: write("name", {key: (dtype, array)}, metadata) -> its path."""

    def make(name: str, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        data = b""
        for key, (dtype, array) in sorted(tensors.items(), key=lambda item: (-DTYPE_BITS[item[1][0]], item[0])):
            raw = np.ascontiguousarray(array).tobytes()
            header[key] = {
                "dtype": dtype,
                "shape": list(array.shape),
                "data_offsets": [len(data), len(data) + len(raw)],
            }
            data += raw
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        path = tmp_path / name
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        return path

    return make


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDOPS_CACHE", str(tmp_path / "cache"))
