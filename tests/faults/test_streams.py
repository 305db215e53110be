"""Standard streams that are closed, full, or have lost their reader."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

import pytest

from tests.faults.cli import Outcome, merge


def run(pair: tuple[Path, Path], **options: object) -> Outcome:
    return merge(*pair, "--force", "-o", "out.safetensors", **options)


@pytest.fixture
def data(pair: tuple[Path, Path], folder: Path) -> bytes:
    """What a run with all streams writes."""
    assert run(pair).code == 0
    data = (folder / "out.safetensors").read_bytes()
    (folder / "out.safetensors").unlink()
    return data


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_went_away(stream: str, pair: tuple[Path, Path], data: bytes, folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    ended = run(pair, **{stream: write})
    os.close(write)
    assert ended.code == (141 if stream == "stdout" else 0)
    assert not ended.err
    assert [path.name for path in folder.iterdir()] == ["out.safetensors"]
    assert (folder / "out.safetensors").read_bytes() == data


def test_a_reader_of_errors_that_went_away(pair: tuple[Path, Path], folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    ended = merge(pair[0], "none.safetensors", "-o", "out.safetensors", stderr=write)
    os.close(write)
    assert (ended.code, ended.out) == (141, "")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_closed_streams(closed: tuple[int, ...], pair: tuple[Path, Path], data: bytes, folder: Path) -> None:
    def close() -> None:
        for number in closed:
            os.close(number)

    ended = run(pair, preexec_fn=close)
    assert (ended.code, ended.err) == (0, "")
    assert bool(ended.out) == (1 not in closed)
    assert (folder / "out.safetensors").read_bytes() == data


@pytest.fixture
def full() -> IO[bytes]:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    return open("/dev/full", "wb")


def test_a_full_disk_under_the_result(full: IO[bytes], pair: tuple[Path, Path], data: bytes, folder: Path) -> None:
    with full:
        ended = run(pair, stdout=full)
    assert (ended.code, ended.err) == (1, "error: no space left on device\n")
    assert (folder / "out.safetensors").read_bytes() == data


def test_a_full_disk_under_the_log(full: IO[bytes], pair: tuple[Path, Path], folder: Path) -> None:
    with full:
        ended = merge(pair[0], "none.safetensors", "-o", "out.safetensors", stderr=full)
    assert (ended.code, ended.out) == (1, "")
