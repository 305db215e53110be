"""Headers changed in place: the tensors stay, and no crash at any moment leaves less than the old or the new header."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdops.core import sink_header
from sdops.core.sink_header import SPARE, SameDataSink, encode, recover, replace_header
from sdops.errors import ChangedError, OutputError
from sdops.formats import open_source

ENTRIES = {"w": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]}}
DATA = b"\x01\x02\x03\x04\x05"
OLD, NEW = ({"title": text * 5000} for text in "ab")  # longer than a block of the disk


@pytest.fixture
def old() -> bytes:
    return encode(ENTRIES, OLD)


@pytest.fixture
def new(old) -> bytes:
    return encode(ENTRIES, NEW, len(old))


@pytest.fixture
def path(tmp_path, old) -> Path:
    path = tmp_path / "m.safetensors"
    path.write_bytes(old + DATA)
    return path


def left_over(path: Path) -> list[str]:
    return [name for name in os.listdir(path.parent) if name != path.name]


def test_a_header_has_room_to_spare_and_starts_the_tensors_on_a_block(old):
    assert len(old) % SPARE == 0
    assert SPARE <= len(old) - len(old.rstrip()) < 2 * SPARE
    assert int.from_bytes(old[:8], "little") == len(old) - 8


def test_a_header_that_does_not_fit_is_refused():
    least = len(encode(ENTRIES, {}).rstrip())
    assert (
        encode(ENTRIES, {}, least)
        == encode(ENTRIES, {})[:0] + (least - 8).to_bytes(8, "little") + encode(ENTRIES, {}).rstrip()[8:]
    )
    assert encode(ENTRIES, {}, least - 1) is None


def test_the_header_is_replaced_and_nothing_else(path, old, new):
    mode, inode = path.stat().st_mode, path.stat().st_ino
    replace_header(path, old, new)
    assert path.read_bytes() == new + DATA
    assert (path.stat().st_mode, path.stat().st_ino) == (mode, inode)
    assert left_over(path) == []
    assert open_source(path).metadata == NEW


def test_a_file_that_changed_is_left_alone(path, old, new):
    path.write_bytes(new + DATA)
    with pytest.raises(ChangedError):
        replace_header(path, old, new)
    assert path.read_bytes() == new + DATA


def test_a_link_is_followed(path, old, new):
    link = path.with_name("link.safetensors")
    link.symlink_to(path)
    replace_header(link, old, new)
    assert link.is_symlink()
    assert path.read_bytes() == new + DATA


def test_two_at_once(path, old, new):
    with sink_header._locked(path), pytest.raises(OutputError, match="being edited"):
        replace_header(path, old, new)


def crash_after(steps: int, path: Path, old: bytes, new: bytes) -> bool:
    """Replace the header in a process that is killed at its `steps`-th system call; True if it got through."""
    child = os.fork()
    if child == 0:
        left = steps
        real = {name: getattr(os, name) for name in ("pwrite", "fsync", "replace", "unlink")}

        def counted(name):
            def call(*arguments):
                nonlocal left
                if left == 0:
                    if name == "pwrite":  # killed between two blocks
                        real["pwrite"](arguments[0], arguments[1][:4096], arguments[2])
                    os._exit(9)
                left -= 1
                return real[name](*arguments)

            return call

        try:
            for name in real:
                setattr(os, name, counted(name))
            replace_header(path, old, new)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def test_a_crash_at_any_moment(path, old, new):
    states = set()
    for steps in range(40):
        path.write_bytes(old + DATA)
        done = crash_after(steps, path, old, new)
        torn = path.read_bytes() not in (old + DATA, new + DATA)
        assert recover(path) == torn
        assert path.read_bytes() in (old + DATA, new + DATA)
        assert not recover(path)
        assert [name for name in left_over(path) if name.endswith(".undo")] == []
        states.add((torn, path.read_bytes() == new + DATA))
        if done:
            break
    assert done
    assert path.read_bytes() == new + DATA
    assert states == {(False, False), (True, False), (False, True)}


def test_a_failing_disk_leaves_the_old_header(path, old, new, monkeypatch):
    real = os.pwrite
    calls = []

    def failing(fd, data, offset):
        calls.append(offset)
        if len(calls) == 1:
            return real(fd, data[:4096], offset)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        replace_header(path, old, new)
    assert path.read_bytes() == old + DATA
    assert left_over(path) == []


def test_another_file_of_that_name_is_not_recovered(path, old, new):
    for steps in range(40):
        path.write_bytes(old + DATA)
        crash_after(steps, path, old, new)
        if path.read_bytes() not in (old + DATA, new + DATA):
            break
    other = encode(ENTRIES, {"title": "c" * 5000}, len(old)) + DATA
    path.write_bytes(other)
    assert not recover(path)
    assert path.read_bytes() == other
    assert left_over(path) == []


def test_a_broken_journal_is_thrown_away(path, old):
    sink_header.journal_of(path).write_bytes(b"something else")
    assert not recover(path)
    assert path.read_bytes() == old + DATA
    assert left_over(path) == []


def test_a_new_file_keeps_the_tensors(path, old, tmp_path):
    source = open_source(path)
    header = encode(ENTRIES, NEW)
    with SameDataSink(tmp_path / "n.safetensors", source.specs, header, force=False) as sink:
        sink.write("w", 0, memoryview(DATA))
        sink.commit()
    assert (tmp_path / "n.safetensors").read_bytes() == header + DATA
