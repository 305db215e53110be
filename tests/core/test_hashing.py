"""Digests against given vectors, and a cache that never lies and never fails."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdops.core import hashing
from sdops.core.hashing import cached_sha256, digests, fingerprint, remember, sha256
from sdops.errors import ChangedError, SdopsError

VECTORS = json.loads((Path(__file__).parents[2] / "fixtures" / "hash_vectors.json").read_text())["vectors"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDOPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hashes"


@pytest.fixture
def settled(monkeypatch):
    """Files of these tests are always younger than the age from which digests are kept."""
    monkeypatch.setattr(hashing, "_SETTLE_NS", -1)


def write_vector(path: Path, metadata: dict[str, str] | None, n: int) -> None:
    data = struct.pack(f"<{n}f", *(i * 0.5 for i in range(n)))
    header = {} if metadata is None else {"__metadata__": metadata}
    header["w"] = {"dtype": "F32", "shape": [n], "data_offsets": [0, len(data)]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['n']}-{'meta' if v['metadata'] else 'bare'}")
def test_vectors(vector, tmp_path):
    path = tmp_path / "v.safetensors"
    write_vector(path, vector["metadata"], vector["n"])
    found = digests(path)
    assert path.stat().st_size == vector["size"]
    assert found.sha256 == vector["sha256"]
    assert found.tensors == vector["tensor_sha256"]
    assert found.legacy == vector["legacy_autov1"]
    assert found.sha256[:10] == vector["autov2"]
    assert found.tensors[:12] == vector["autov3"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.integers(0, 5000), data=st.integers(0, 5000), buffer=st.integers(1, 3000))
def test_any_split_into_buffers_gives_the_same_digests(header, data, buffer, tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "_BUFFER", buffer)
    monkeypatch.setattr(hashing, "_LEGACY", slice(1000, 2000))
    text, tensors = b"{" + b" " * header + b"}", bytes(i % 251 for i in range(data))
    content = len(text).to_bytes(8, "little") + text + tensors
    path = tmp_path / "f"
    path.write_bytes(content)
    found = digests(path, fresh=True)
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert found.tensors == hashlib.sha256(tensors).hexdigest()
    assert found.legacy == hashlib.sha256(content[1000:2000]).hexdigest()[:8]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 zip", b"\xff" * 100, (99).to_bytes(8, "little") + b"{}"])
def test_other_formats_have_no_tensor_digest(content, tmp_path):
    path = tmp_path / "f.ckpt"
    path.write_bytes(content)
    found = digests(path)
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert found.tensors is None


def test_progress_adds_up(tmp_path):
    from contextlib import contextmanager

    seen = []

    @contextmanager
    def progress(label, total):
        seen.append((label, total))
        yield seen.append

    path = tmp_path / "f"
    path.write_bytes(bytes(10_000_000))
    digests(path, progress)
    assert seen[0] == ("hashing f", 10_000_000)
    assert sum(seen[1:]) == 10_000_000
    assert len(seen) > 2


def test_the_second_time_nothing_is_read(tmp_path, settled, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"x")
    assert cached_sha256(path) is None
    first = digests(path)
    monkeypatch.setattr(hashing, "_read", lambda *_: pytest.fail("the file was read"))
    assert digests(path) == first
    assert sha256(path) == cached_sha256(path) == first.sha256


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b"y"),
        lambda path: path.write_bytes(b"xx"),
        lambda path: (path.unlink(), path.write_bytes(b"x")),
        lambda path: os.utime(path, ns=(1, 1)),
    ],
    ids=["content", "size", "another file", "time"],
)
def test_a_changed_file_is_not_taken_for_the_old_one(change, tmp_path, settled):
    path = tmp_path / "f"
    path.write_bytes(b"x")
    sha256(path)
    time.sleep(0.02)  # a tick of the file system's clock
    change(path)
    assert cached_sha256(path) is None
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_written_just_now_is_not_remembered(tmp_path):
    """Within one tick of the clock it may change again and look the same."""
    path = tmp_path / "f"
    path.write_bytes(b"x")
    sha256(path)
    assert cached_sha256(path) is None


def test_links_share_an_entry(tmp_path, settled):
    path, link = tmp_path / "f", tmp_path / "link"
    path.write_bytes(b"x")
    link.symlink_to(path)
    sha256(link)
    assert cached_sha256(path) == sha256(path)


def test_a_digest_from_elsewhere_is_remembered(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"x")
    true = hashlib.sha256(b"x").hexdigest()
    remember(path, fingerprint(path), true)
    assert cached_sha256(path) == true
    assert digests(path).legacy == hashlib.sha256(b"").hexdigest()[:8]  # was not known: the file is read


def test_an_outdated_fingerprint_is_not_believed(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"x")
    mark = fingerprint(path)
    path.write_bytes(b"xy")
    remember(path, mark, "0" * 64)
    assert cached_sha256(path) is None


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"path":1,"mark":2}', b'{"mark": [1], "sha256": "x"}', b"[" * 100_000],
)
def test_a_damaged_entry_is_ignored_and_replaced(damage, tmp_path, settled, cache):
    path = tmp_path / "f"
    path.write_bytes(b"x")
    true = sha256(path)
    (entry,) = cache.iterdir()
    entry.write_bytes(damage)
    assert cached_sha256(path) is None
    assert sha256(path) == cached_sha256(path) == true


def test_a_digest_that_is_none_is_ignored(tmp_path, settled, cache):
    path = tmp_path / "f"
    path.write_bytes(b"x")
    sha256(path)
    (entry,) = cache.iterdir()
    entry.write_text(entry.read_text().replace('"sha256": "', '"sha256": "zz'))
    assert cached_sha256(path) is None


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, settled, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"x")
    monkeypatch.setenv("SDOPS_CACHE", str(path))  # a file where the folder should be
    assert sha256(path) == hashlib.sha256(b"x").hexdigest()
    assert cached_sha256(path) is None


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"x")
    read = hashing._read

    def meddle(*arguments):
        with open(path, "ab") as file:
            file.write(b"more")
        return read(*arguments)

    monkeypatch.setattr(hashing, "_read", meddle)
    with pytest.raises(ChangedError, match="f` changed while it was read"):
        sha256(path)


_HASH_ALL = """
import sys
from sdops.core import hashing
hashing._SETTLE_NS = -1
for _ in range(20):
    for path in sys.argv[1:]:
        hashing.digests(path, fresh=True)
"""


def test_processes_share_the_cache(tmp_path, cache):
    paths = [tmp_path / f"f{i}" for i in range(8)]
    for path in paths:
        path.write_bytes(path.name.encode())
    command = [sys.executable, "-c", _HASH_ALL, *map(str, paths)]
    children = [subprocess.Popen(command) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    for path in paths:
        assert cached_sha256(path) == hashlib.sha256(path.name.encode()).hexdigest()
    assert len(list(cache.iterdir())) == 8  # and no drafts


def test_what_cannot_be_read_is_an_expected_error(tmp_path):
    with pytest.raises(SdopsError, match="absent` cannot be read: No such file"):
        sha256(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SdopsError, match="pipe` is not a file"):
        sha256(tmp_path / "pipe")
