"""Copying a Source into a sink with threads: every byte once, errors from threads, portions."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from sdops.core import run as module
from sdops.core.run import default_jobs, run
from sdops.core.sink import SafetensorsSink
from tests import tiny
from tests.tiny import Memory

RNG = np.random.default_rng(0)
MODEL: tiny.Model = {
    "large": ("F32", RNG.standard_normal((700, 3001)).astype("f4")),  # 8.4 MB, several jobs
    "scalar": ("F16", np.array(3, "f2")),
    "empty": ("F32", np.zeros((0, 4), "f4")),
    **{f"small.{i}": ("I64", np.arange(i)) for i in range(40)},
}


def copied(source: Memory, path: Path, jobs: int) -> list[int]:
    steps: list[int] = []
    with SafetensorsSink(path, source.specs, {}, force=True) as sink:
        run(source, sink, jobs=jobs, progress=steps.append)
        sink.commit()
    return steps


@pytest.mark.parametrize("jobs", [1, 2, 7])
def test_every_byte_is_copied_once(jobs: int, tmp_path: Path) -> None:
    source = Memory(MODEL)
    steps = copied(source, tmp_path / "out.safetensors", jobs)
    out = tiny.load(tmp_path / "out.safetensors")
    assert out.keys() == MODEL.keys()
    assert all(tiny.same(out[key], MODEL[key]) for key in MODEL)
    sizes = {key: np.asarray(array).nbytes for key, (_, array) in MODEL.items()}
    assert sum(steps) == sum(sizes.values())
    assert source.reads == {key: size for key, size in sizes.items() if size}


class Picky(Memory):
    """Wants portions of 1000 bytes, and one thread per tensor."""

    def __init__(self, model: tiny.Model) -> None:
        super().__init__(model)
        self.seen: dict[str, list[tuple[int, int, int]]] = {}

    def piece_bytes(self, _: str) -> int:
        return 1000

    def splits(self, _: str) -> bool:
        return False

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        self.seen.setdefault(key, []).append((start, len(buffer), threading.get_ident()))
        super().read_into(key, start, buffer)


def test_the_source_says_in_which_portions_it_is_read(tmp_path: Path) -> None:
    source = Picky(MODEL)
    copied(source, tmp_path / "out.safetensors", 4)
    for key, reads in source.seen.items():
        nbytes = source.specs[key].nbytes
        assert [start for start, _, _ in reads] == list(range(0, nbytes, 1000))
        assert all(length == 1000 for _, length, _ in reads[:-1])
        assert len({thread for _, _, thread in reads}) == 1
    assert tiny.same(tiny.load(tmp_path / "out.safetensors")["large"], MODEL["large"])


class Broken(Memory):
    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        if key == "small.7":
            raise ValueError("small.7 is broken")
        super().read_into(key, start, buffer)


@pytest.mark.parametrize("jobs", [1, 4])
def test_an_error_in_a_thread_reaches_the_caller_and_leaves_nothing(jobs: int, tmp_path: Path) -> None:
    threads = threading.active_count()
    with pytest.raises(ValueError, match="broken"):
        copied(Broken(MODEL), tmp_path / "out.safetensors", jobs)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


def test_a_failing_progress_ends_the_run(tmp_path: Path) -> None:
    def advance(_: int) -> None:
        raise RuntimeError("no terminal")

    source = Memory(MODEL)
    sink = SafetensorsSink(tmp_path / "out.safetensors", source.specs, {}, force=True)
    with sink, pytest.raises(RuntimeError, match="no terminal"):
        run(source, sink, jobs=2, progress=advance)


def test_the_disk_is_kept_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = threading.Event()
    monkeypatch.setattr(module, "WRITEBACK_BYTES", 1 << 20)
    monkeypatch.setattr(SafetensorsSink, "start_writeback", lambda _: called.set())
    source, written = Memory(MODEL), [0]

    def advance(nbytes: int) -> None:
        written[0] += nbytes
        if written[0] > 1 << 20:
            called.wait(5)

    with SafetensorsSink(tmp_path / "out.safetensors", source.specs, {}, force=True) as sink:
        run(source, sink, jobs=1, progress=advance)
    assert called.is_set()


def test_a_source_without_tensors(tmp_path: Path) -> None:
    assert copied(Memory({}), tmp_path / "out.safetensors", 2) == []
    assert tiny.load(tmp_path / "out.safetensors") == {}


def test_default_jobs_is_a_number_of_threads() -> None:
    assert 1 <= default_jobs() <= 8
