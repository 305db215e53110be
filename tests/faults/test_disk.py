"""Disks that are full, or become so; files that may not grow."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sdops.core import files
from tests.faults.cli import end, leftovers, merge, sparse, start, stop_while_writing, wait_until

MB = 1 << 20


def fill(disk: Path, leave: int = 0) -> Path:
    """Take up all room but `leave` bytes."""
    filler = disk / "filler"
    with filler.open("ab") as file:
        while (room := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - leave) > 0:
            try:
                os.write(file.fileno(), bytes(min(room, 4 * MB)))
            except OSError:
                break
    assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize <= leave
    return filler


def test_a_disk_that_is_too_small(large: tuple[Path, Path], disk: Callable[[str], Path]) -> None:
    point = disk("size=16m")
    ended = merge(*large, "-o", point / "out.safetensors")
    assert ended.code == 1
    assert f"`out.safetensors` needs 33.6 MB, `{point}` has 16.8 MB free" in ended.err
    assert list(point.iterdir()) == []


def test_an_existing_file_is_kept_until_the_new_one_is_complete(
    large: tuple[Path, Path], disk: Callable[[str], Path]
) -> None:
    point = disk("size=48m")
    output = point / "out.safetensors"
    assert merge(*large, "-o", output).code == 0
    before = output.read_bytes()
    ended = merge(*large, "--force", "-o", output)
    assert ended.code == 1
    assert "an existing file is only replaced when the new one is complete" in ended.err
    assert output.read_bytes() == before
    assert leftovers(point) == []


def test_room_for_a_large_file_is_taken_at_once(disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LARGE", MB)
    with (disk("size=4m") / "file").open("wb") as file, pytest.raises(OSError, match="No space left"):
        files.reserve(file.fileno(), 8 * MB)


def test_a_disk_that_becomes_full_meanwhile(large: tuple[Path, Path], disk: Callable[[str], Path]) -> None:
    point = disk("size=48m")
    child = start(*large, "-o", point / "out.safetensors")
    stop_while_writing(child, point)
    filler = fill(point)
    child.send_signal(signal.SIGCONT)
    ended = end(child)
    assert ended.code == 1
    assert f"no space left while writing `{point / 'out.safetensors'}`" in ended.err
    assert "it needs 33.6 MB" in ended.err
    assert list(point.iterdir()) == [filler]


def test_a_disk_without_inodes(pair: tuple[Path, Path], disk: Callable[[str], Path]) -> None:
    point = disk("size=1m,nr_inodes=1")
    ended = merge(*pair, "-o", point / "out.safetensors")
    assert ended.code == 1
    assert "no space left" in ended.err


def test_room_taken_by_a_dead_run_counts_as_free(tmp_path: Path, disk: Callable[[str], Path]) -> None:
    inputs = [sparse(tmp_path / name, 1 << 25) for name in ("a.safetensors", "b.safetensors")]  # 67 MB
    point = disk("size=100m")
    child = start(*inputs, "-o", point / "out.safetensors")
    stop_while_writing(child, point, written=8 * MB)
    child.kill()
    assert end(child).code == 137
    (dead,) = leftovers(point)
    filler = fill(point, leave=60 * MB)
    ended = merge(*inputs, "-o", point / "out.safetensors")
    assert ended.code == 0, ended.err
    assert not dead.exists()
    assert sorted(path.name for path in point.iterdir()) == [filler.name, "out.safetensors"]


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (MB, MB))


def test_a_limit_of_file_sizes(large: tuple[Path, Path], folder: Path) -> None:
    ended = merge(*large, "-o", "out.safetensors", preexec_fn=limit_file_size)
    assert ended.code == 1
    assert "`out.safetensors` needs 33.6 MB, this session may write files of 1.05 MB" in ended.err
    assert "`ulimit -f`" in ended.err
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="the limit of another process: Linux")
def test_a_limit_of_file_sizes_that_comes_meanwhile(large: tuple[Path, Path], folder: Path) -> None:
    child = start(*large, "-o", "out.safetensors")
    temporary = stop_while_writing(child, folder)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (MB, MB))
    assert temporary.exists()
    child.send_signal(signal.SIGCONT)
    ended = end(child)
    assert ended.code == 1
    assert "`out.safetensors` would have 33.6 MB, which is more than a file may have here" in ended.err
    assert list(folder.iterdir()) == []


def test_the_folder_goes_away_meanwhile(large: tuple[Path, Path], folder: Path) -> None:
    place = folder / "place"
    place.mkdir()
    child = start(*large, "-o", place / "out.safetensors")
    wait_until(lambda: leftovers(place), child)
    child.send_signal(signal.SIGSTOP)
    leftovers(place)[0].unlink()
    place.rmdir()
    child.send_signal(signal.SIGCONT)
    ended = end(child)
    assert ended.code == 1
    assert f"writing `{place / 'out.safetensors'}` failed: No such file or directory" in ended.err
