"""Positioned reads and writes, also on systems without calls for them, and whole commands there.

What Windows lacks is taken away from Python here; how Windows treats open files is not imitated.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sdops.core import files
from tests.tiny import checkpoint, write

WITHOUT = """
import os, signal, sys
for name in ("pread", "preadv", "pwrite", "pwritev", "fork", "fchmod", "fdatasync", "sched_getaffinity", "sysconf",
             "O_CLOEXEC", "O_NONBLOCK", "O_NOFOLLOW", "O_DIRECTORY"):
    if hasattr(os, name):
        delattr(os, name)
del signal.SIGHUP
sys.modules["fcntl"] = sys.modules["resource"] = None
import sdops.core.processes
sdops.core.processes.can_fork = lambda: False
from sdops.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(params=["posix", "plain"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        for name in ("preadv", "pwrite"):
            monkeypatch.delattr(os, name, raising=False)


def test_threads_share_a_file(system: None, tmp_path: Path) -> None:
    fd = files.open_file(tmp_path / "file", "O_RDWR", "O_CREAT", "O_EXCL")
    pieces = {i: bytes([i]) * 1000 for i in range(64)}

    def work(mine: range) -> None:
        for i in mine:
            files.write_at(fd, memoryview(pieces[i]), 1000 * i)
            assert files.read_bytes(fd, 1000, 1000 * i) == pieces[i]

    threads = [threading.Thread(target=work, args=(range(k, 64, 4),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files.read_bytes(fd, 1 << 20, 0) == b"".join(pieces.values())
    os.close(fd)


def test_a_large_file_gets_its_place_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LARGE", 1 << 20)
    with (tmp_path / "small").open("wb") as small, (tmp_path / "large").open("wb") as large:
        files.reserve(small.fileno(), (1 << 20) - 1)
        files.reserve(large.fileno(), 4 << 20)
        found = [os.fstat(each.fileno()) for each in (small, large)]
    assert [each.st_size for each in found] == [(1 << 20) - 1, 4 << 20]
    assert (tmp_path / "large").read_bytes() == bytes(4 << 20)
    if not found[1].st_blocks:
        pytest.skip("this file system cannot do it")
    assert found[0].st_blocks == 0
    assert found[1].st_blocks * 512 >= 4 << 20


def test_only_one_has_the_lock(tmp_path: Path) -> None:
    first = files.open_file(tmp_path / "file", "O_RDWR", "O_CREAT")
    second = files.open_file(tmp_path / "file", "O_RDWR")
    files.lock(first)
    assert not files.try_lock(second)
    os.close(first)
    assert files.try_lock(second)
    os.close(second)


@pytest.mark.parametrize(
    "command",
    [
        ("merge", "a.safetensors", "b.safetensors", "--alpha", "0.3", "-o", "out.safetensors"),
        ("merge", "a.safetensors", "b.safetensors", "-m", "slerp", "-o", "out.safetensors"),
        ("convert", "a.safetensors", "--to", "safetensors", "--dtype", "bf16", "-o", "out.safetensors"),
        ("meta", "out.safetensors", "--set", "author=me"),
    ],
    ids=lambda command: " ".join(command[:4]),
)
def test_commands_without_posix_give_the_same_bytes(command: tuple[str, ...], tmp_path: Path) -> None:
    outputs = []
    for name, start in (("posix", ["-m", "sdops"]), ("plain", ["-c", WITHOUT])):
        folder = tmp_path / name
        folder.mkdir()
        for letter in "ab":
            write(folder / f"{letter}.safetensors", checkpoint(ord(letter)))
        if command[0] == "meta":
            write(folder / "out.safetensors", checkpoint(3))
        ended = subprocess.run(
            [sys.executable, *start, *command], check=False, cwd=folder, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors", "b.safetensors", "out.safetensors"]
        outputs.append((folder / "out.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
