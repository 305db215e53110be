"""Checkpoints written by torch or around any pickle, and what they must give."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdops.core.source import read
from sdops.formats import open_source
from tests.formats.writers import raw_bytes


def save(path: Path, value: Any, *, legacy: bool = False, protocol: int = 2) -> Path:
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return path


def check(path: Path, tensors: dict[str, Tensor]) -> Any:
    """The file gives exactly these tensors; returns the closed Source."""
    source = open_source(path)
    try:
        assert set(source.specs) == set(tensors)
        for key, tensor in tensors.items():
            assert source.specs[key].shape == tuple(tensor.shape)
            assert read(source, key) == raw_bytes(tensor)
    finally:
        source.close()
    return source


def zip_with(path: Path, data: bytes, members: dict[str, bytes] | None = None, root: str = "archive") -> Path:
    """A zip as torch writes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", data)
        for name, content in ({"version": b"3\n"} | (members or {})).items():
            archive.writestr(f"{root}/{name}", content)
    return path


def legacy_with(path: Path, data: bytes) -> Path:
    """A legacy file around any pickle, without storages."""
    parts = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join([*parts, data, pickle.dumps([], 2)]))
    return path
