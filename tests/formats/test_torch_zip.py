"""Zip archives that two readers understand differently, and other structures that torch never writes."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest

from sdops.errors import FormatError
from sdops.formats import open_source
from tests.formats.torch_files import save, zip_with
from tests.formats.writers import sample


def archive(tmp_path: Path) -> Path:
    return save(tmp_path / "x.pt", sample())


def rewrite(path: Path, change: Any, **options: Any) -> Path:
    """The archive once more, with `change(name, data)` giving a list of (name, data)."""
    with zipfile.ZipFile(path) as old:
        entries = [(info.filename, old.read(info)) for info in old.infolist()]
    with zipfile.ZipFile(path, "w", **options) as new:
        for name, data in entries:
            for changed in change(name, data):
                new.writestr(*changed)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_two_members_of_one_name(tmp_path, member):
    path = rewrite(archive(tmp_path), lambda name, data: [(name, data)] * (2 if name.endswith(member) else 1))
    with pytest.raises(FormatError, match="one thing twice"):
        open_source(path)


def test_compressed_members(tmp_path):
    path = rewrite(archive(tmp_path), lambda name, data: [(name, data)], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match="compressed"):
        open_source(path)


def test_a_zip_bomb(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(1 << 28))
    with pytest.raises(FormatError, match="compressed"):
        open_source(path)


@pytest.mark.parametrize("extra", ["other/data/9", "archive/evil.py", "archive/data/a/b", "archive/../x", "/data.pkl"])
def test_foreign_members(tmp_path, extra):
    path = archive(tmp_path)
    with zipfile.ZipFile(path, "a") as changed:
        changed.writestr(extra, b"x")
    with pytest.raises(FormatError, match="holds what torch does not write"):
        open_source(path)


def test_bytes_before_the_archive(tmp_path):
    path = archive(tmp_path)
    path.write_bytes(b"PK\3\4" + bytes(26) + path.read_bytes())
    with pytest.raises(FormatError, match=r"x\.pt"):
        open_source(path)
    path.write_bytes(b"#!/bin/sh\n" + archive(tmp_path).read_bytes())
    with pytest.raises(FormatError, match="not a model file"):
        open_source(path)


def directory_at(content: bytes) -> int:
    """Position of the central directory."""
    return content.index(b"PK\1\2")


def test_directory_and_members_disagree(tmp_path):
    path = archive(tmp_path)
    content = bytearray(path.read_bytes())
    start = content.index(b"data.pkl")
    content[start : start + 8] = b"data.pkx"  # the member's own header
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"contradicts itself|without a torch model"):
        open_source(path)
    content = bytearray(archive(tmp_path).read_bytes())
    content[6] ^= 2  # flags of the first member
    path.write_bytes(content)
    with pytest.raises(FormatError, match="contradicts itself"):
        open_source(path)


def test_overlapping_members(tmp_path):
    """Two entries of the directory that lead to the same bytes."""
    path = archive(tmp_path)
    content = bytearray(path.read_bytes())
    entry = directory_at(content)
    size = struct.unpack_from("<I", content, entry + 20)[0]
    struct.pack_into("<II", content, entry + 20, size + 400, size + 400)
    path.write_bytes(content)
    with pytest.raises(FormatError, match="overlap"):
        open_source(path)


def test_a_member_beyond_the_end(tmp_path):
    path = zip_with(tmp_path / "x.pt", pickle.dumps({}, 2))
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\1\2", directory_at(content) + 4)
    struct.pack_into("<II", content, entry + 20, 1 << 30, 1 << 30)
    path.write_bytes(content)
    with pytest.raises(FormatError, match="overlap"):
        open_source(path)


def test_a_damaged_pickle(tmp_path):
    path = archive(tmp_path)
    content = bytearray(path.read_bytes())
    content[content.index(b"conv.bias")] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match="checksum"):
        open_source(path)


def test_a_pickle_that_goes_on(tmp_path):
    with pytest.raises(FormatError, match="goes on behind its end"):
        open_source(zip_with(tmp_path / "x.pt", pickle.dumps({}, 2) + b"N."))


def test_unknown_byte_order(tmp_path):
    with pytest.raises(FormatError, match="byte order"):
        open_source(zip_with(tmp_path / "x.pt", pickle.dumps({}, 2), {"byteorder": b"middle"}))
