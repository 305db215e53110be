"""Sums of sums in one go: the bits of one sum after the other, and out of the way where that cannot be."""

from __future__ import annotations

import errno
import os
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdops.core import native
from sdops.core.applied import Applied, Change, LowRank
from sdops.core.chain import GIVEN, MOST_REGISTERS, PORTION, POURED, Chain, chain_of, link
from sdops.core.exact import PIECE
from sdops.core.merged import Merged
from sdops.core.method import load
from sdops.core.plan import Input, Plan, Step, Steps
from sdops.core.remembered import Remembered
from sdops.core.run import run
from sdops.core.sink import SafetensorsSink
from sdops.core.source import Source, read
from sdops.core.spec import Spec
from sdops.errors import ChangedError, FormatError, OutputError
from sdops.formats import FileSource, open_source
from sdops.formats.safetensors import SafetensorsFile
from tests.tiny import Memory, Model, encoded, write

needs_library = pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
KEY = "w"
METHODS = {name: load(f"sdops.merges.{name}", "linear", frozenset()) for name in ("weighted_sum", "add_difference")}


def tensor(seed: int, dtype: str, count: int, scale: float = 1.0) -> Memory:
    return Memory({KEY: values(seed, dtype, count, scale)}, f"{seed}")


def values(seed: int, dtype: str, count: int, scale: float = 1.0) -> tuple[str, Any]:
    return encoded(np.random.default_rng(seed).standard_normal(count) * scale, dtype)


def merged(sources: Sequence[Source], dtype: str, alpha: float) -> Merged:
    inputs = tuple(Input(source, KEY, index) for index, source in enumerate(sources))
    step = Step(Spec(dtype, sources[0].specs[KEY].shape), "merge", inputs, {"alpha": alpha})
    method = METHODS["weighted_sum" if len(sources) == 2 else "add_difference"]
    return Merged(Plan("out", Steps({KEY: step})), method, sampled=False)


def by_steps(source: Source, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """What it is without chains."""
    with monkeypatch.context() as patched:
        patched.setattr(Merged, "_chained", lambda *_: False)
        return bytes(read(source, KEY))


DTYPES = st.sampled_from(native.DTYPES)
STEP = st.tuples(
    st.lists(st.integers(0, 30), min_size=2, max_size=3),
    DTYPES,
    st.sampled_from([0.0, 0.5, 0.3, -0.7, 1.0, 1e-3, 100.0, 0.1]),
    st.booleans(),
)


@needs_library
@settings(max_examples=40, deadline=None)
@given(dtypes=st.lists(DTYPES, min_size=3, max_size=3), steps=st.lists(STEP, min_size=2, max_size=7), data=st.data())
def test_same_bits_as_one_after_the_other(dtypes, steps, data):
    """Any graph of merges: steps read files and earlier steps, in all formats; some are remembered for several."""
    scale = data.draw(st.sampled_from([1.0, 1e-6, 3e4]))
    sources: list[Source] = [tensor(i, dtype, 1200, scale) for i, dtype in enumerate(dtypes)]
    for reads, dtype, alpha, remembered in steps:
        made = merged([sources[i % len(sources)] for i in reads], dtype, alpha)
        sources.append(Remembered(made) if remembered else made)
    last = merged([sources[-1], sources[0]], "F16", 0.25)
    with pytest.MonkeyPatch.context() as patched:
        assert bytes(read(last, KEY)) == by_steps(last, patched)


@needs_library
def test_a_chain_reads_every_file_once_and_works_in_portions(monkeypatch):
    size = 2 * PIECE + GIVEN + 3
    a, b = tensor(1, "F16", size), tensor(2, "F16", size)
    reads: list[tuple[str, int]] = []
    real = Memory.read_into

    def counted(self, key, start, buffer):
        reads.append((self.name, start))
        real(self, key, start, buffer)

    inner = merged([a, b], "F16", 0.3)
    last = merged([inner, a, b], "F16", 0.1)
    wanted = by_steps(last, monkeypatch)
    monkeypatch.setattr(Memory, "read_into", counted)
    assert bytes(read(last, KEY)) == wanted
    assert sorted(reads) == sorted((name, 2 * GIVEN * i) for name in "12" for i in range(-(-size // GIVEN)))


@needs_library
def test_merges_of_files_are_no_chains():
    a, b = tensor(1, "F16", 10), tensor(2, "F16", 10)
    assert chain_of(merged([a, b], "F16", 0.3), KEY) is None
    assert chain_of(merged([merged([a, b], "F16", 1.0), b], "F16", 0.5), KEY) is None  # alpha 1 is b itself
    assert chain_of(merged([merged([a, b], "F16", 0.3), b], "F16", 0.5), KEY) is not None


@needs_library
def test_what_is_not_finite_is_told_by_the_step_that_reads_it():
    bad = Memory({KEY: encoded(np.array([1.0, np.nan, 2.0]), "F16")}, "bad")
    good = tensor(1, "F16", 3)
    last = merged([merged([good, good], "F16", 0.5), bad], "F16", 0.5)
    with pytest.raises(FormatError, match="`w` of `bad` holds 1 NaN"):
        read(last, KEY)


@needs_library
@pytest.mark.parametrize("size", [2, 700])  # chain.c works on 512 elements, and has another way for whole blocks
def test_overflows_in_between_are_clamped_and_counted(size, monkeypatch):
    big = Memory({KEY: encoded(np.array([60000.0] + [1.0] * (size - 1)), "F16")}, "big")
    zero = Memory({KEY: encoded(np.zeros(size), "F16")}, "zero")
    inner = merged([big, big, zero], "F16", 1.0)  # 120000
    last = merged([inner, zero], "F16", 0.5)
    assert bytes(read(last, KEY)) == by_steps(last, monkeypatch)
    assert inner.overflows == {KEY: 2}  # by either way


@needs_library
def test_loras_in_between(monkeypatch):
    """Rows 0 .. 700 of 900 change; portions begin within rows, too."""
    shape, rng = (900, 1280), np.random.default_rng(3)
    sources = [Memory({KEY: encoded(rng.standard_normal(shape), "F16")}, str(i)) for i in range(3)]
    up, down = (rng.standard_normal(size).astype(np.float32) for size in ((700, 5), (5, 1280)))
    change = Change(sources[0].specs[KEY], (LowRank(0, 700, lambda: (lambda first, last: up[first:last], down)),))
    styled = Applied(merged(sources[:2], "F16", 0.3), {KEY: change})
    last = merged([styled, sources[2]], "F16", 0.4)
    assert chain_of(last, KEY) is not None
    assert bytes(read(last, KEY)) == by_steps(last, monkeypatch)

    base = merged(sources[:2], "F16", 0.3)
    alone = Applied(Memory({KEY: ("F16", np.frombuffer(read(base, KEY), np.uint16).reshape(shape))}), {KEY: change})
    assert bytes(read(alone, KEY)) == by_steps(styled, monkeypatch)  # portions of a file are others than of a merge


@needs_library
def test_a_step_whose_weights_are_all_zero(monkeypatch):
    """It is a sum of nothing, of which compiled code has no first term."""
    step = Step(Spec("F16", (600,)), "merge", (Input(tensor(1, "F16", 600), KEY, 0),), {"alpha": 0.0})
    nothing = Merged(Plan("out", Steps({KEY: step})), load("sdops.merges.scale", "linear", frozenset()))
    inner = merged([nothing, tensor(2, "F16", 600)], "F16", 0.25)
    last = merged([inner, tensor(3, "F16", 600)], "F16", 0.25)
    assert chain_of(last, KEY) is not None
    assert bytes(read(last, KEY)) == by_steps(last, monkeypatch)
    assert bytes(read(nothing, KEY)) == bytes(1200)


@needs_library
def test_a_chain_that_needs_more_registers_than_there_are(monkeypatch):
    files: list[Source] = [tensor(i, "F16", 40) for i in range(MOST_REGISTERS + 2)]
    inner = [merged([one, files[0]], "F16", 0.5) for one in files]
    step = Step(Spec("F16", (40,)), "merge", tuple(Input(one, KEY, i) for i, one in enumerate(inner)), {})
    last = Merged(Plan("out", Steps({KEY: step})), load("sdops.merges.average", "linear", frozenset()))
    assert chain_of(last, KEY) is None
    assert bytes(read(last, KEY)) == by_steps(last, monkeypatch)


@needs_library
def test_registers_are_used_again():
    source: Source = tensor(0, "F16", 4)
    for number in range(1, 200):
        source = merged([source, tensor(number, "F16", 4)], "F16", 0.1)
    assert Chain(link(source, KEY, {})).is_compiled


def in_files(folder: Path, count: int) -> list[FileSource]:
    """Three models of other dtypes, each with a tensor before the one that is merged."""
    found = []
    for number, dtype in enumerate(native.DTYPES):
        model: Model = {"a": encoded(np.ones(number + 1), dtype), KEY: values(number, dtype, count)}
        found.append(open_source(write(folder / f"{dtype}.safetensors", model)))
    return found


@needs_library
def test_compiled_code_reads_files_itself(tmp_path, monkeypatch):
    files = in_files(tmp_path, PIECE + PORTION + 3)
    last = merged([merged(files[:2], "F16", 0.3), tensor(9, "F16", PIECE + PORTION + 3), files[2]], "BF16", 0.1)
    all_files = merged([merged(files[:2], "F16", 0.3), files[2]], "F32", 0.1)
    wanted = [by_steps(one, monkeypatch) for one in (last, all_files)]
    monkeypatch.setattr(SafetensorsFile, "read_into", lambda *_: pytest.fail("read in Python"))
    assert [bytes(read(one, KEY)) for one in (last, all_files)] == wanted
    size = len(wanted[1])
    data = bytearray(size - 400)
    all_files.read_into(KEY, 400, memoryview(data))  # from any element on
    assert bytes(data) == wanted[1][400:]


@needs_library
@pytest.mark.parametrize("change", [lambda file: file.truncate(3000), lambda file: file.write(b"!")])
def test_files_that_change_while_compiled_code_reads_them(tmp_path, change):
    files = in_files(tmp_path, 5000)
    last = merged([merged(files[:2], "F16", 0.3), files[2]], "F16", 0.1)
    with files[1].files[0].open("r+b") as file:
        change(file)
    with pytest.raises(ChangedError, match=r"BF16\.safetensors"):
        read(last, KEY)


def poured(source: Merged, start: int, stop: int, path: Path) -> bytes | None:
    """Bytes of a tensor that would begin at the fifth of a file, and what lies around them."""
    path.write_bytes(bytes([7]) * (source.specs[KEY].nbytes + 10))
    with path.open("r+b") as file:
        if not source.pour(KEY, start, stop, file.fileno(), 5):
            return None
    data = path.read_bytes()
    assert set(data[: 5 + start] + data[5 + stop :]) <= {7}
    return data[5 + start : 5 + stop]


@needs_library
@pytest.mark.parametrize(("start", "stop"), [(0, None), (400, None), (2 * PORTION - 6, 2 * PORTION + 8), (6, 6)])
def test_compiled_code_writes_files_itself(start, stop, tmp_path, monkeypatch):
    files = in_files(tmp_path, POURED + PORTION + 3)
    last = merged([merged(files[:2], "F16", 0.3), files[2]], "BF16", 0.1)
    stop = last.specs[KEY].nbytes if stop is None else stop
    wanted = by_steps(last, monkeypatch)[start:stop]
    assert poured(last, start, stop, tmp_path / "out") == wanted


@needs_library
def test_loras_from_file_to_file(tmp_path, monkeypatch):
    shape, rng = (700, 1280), np.random.default_rng(3)
    paths = [write(tmp_path / f"{i}.safetensors", {KEY: encoded(rng.standard_normal(shape), "F16")}) for i in range(2)]
    files = [open_source(path) for path in paths]
    terms = []
    for start, rows in ((0, 300), (299, 2), (100, 600)):
        up, down = (rng.standard_normal(size).astype(np.float32) for size in ((rows, 5), (5, 1280)))
        terms.append(LowRank(start, rows, lambda up=up, down=down: (lambda first, last: up[first:last], down)))
    styled = Applied(files[0], {KEY: Change(files[0].specs[KEY], tuple(terms))})
    last = merged([styled, files[1]], "F16", 0.4)
    wanted = by_steps(last, monkeypatch)
    monkeypatch.setattr("sdops.core.applied.multiply", lambda *_: pytest.fail("made by itself"))
    assert poured(last, 0, len(wanted), tmp_path / "out") == wanted


@needs_library
def test_what_cannot_be_poured(tmp_path):
    """What Python has to read, what overflows, and files that cannot be written to."""
    files, memory = in_files(tmp_path, 5000), tensor(9, "F16", 5000)
    assert poured(merged([merged(files[:2], "F16", 0.3), memory], "F16", 0.1), 0, 10000, tmp_path / "out") is None
    assert poured(merged([files[0], files[1]], "F16", 65504.0), 0, 10000, tmp_path / "out") is None
    with (tmp_path / "out").open("rb") as file:
        assert not merged([files[0], files[1]], "F16", 0.5).pour(KEY, 0, 10000, file.fileno(), 0)


@needs_library
def test_a_run_pours_and_a_failure_is_told_in_words(tmp_path, monkeypatch):
    last = merged(in_files(tmp_path, 5000)[:2], "F16", 0.5)
    wanted = by_steps(last, monkeypatch)
    with (
        monkeypatch.context() as patched,
        SafetensorsSink(tmp_path / "out.safetensors", last.specs, {}, force=False) as sink,
    ):
        patched.setattr(Merged, "read_into", lambda *_: pytest.fail("written by Python"))
        run(last, sink, jobs=2)
        sink.commit()
    assert bytes(read(open_source(tmp_path / "out.safetensors"), KEY)) == wanted
    out = (tmp_path / "out.safetensors").open("rb")
    with out, SafetensorsSink(tmp_path / "other.safetensors", last.specs, {}, force=False) as sink:
        monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        monkeypatch.setattr(SafetensorsSink, "region", lambda *_: (out.fileno(), 0))  # compiled code cannot write, too
        with pytest.raises(OutputError, match="no space left"):
            run(last, sink, jobs=2)
    assert bytes(read(open_source(tmp_path / "out.safetensors"), KEY)) == wanted


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_another_thread_writes(tmp_path):
    """The child must not wait for a thread that it does not have."""
    files, stop = in_files(tmp_path, 40_000), threading.Event()
    mine, other = merged(files[:2], "F16", 0.5), merged(files[1:], "F16", 0.5)

    def write_on() -> None:
        while not stop.is_set():
            poured(other, 0, 80_000, tmp_path / "other")

    thread = threading.Thread(target=write_on)
    thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            children = [forked(partial(poured, mine, 0, 80_000, tmp_path / str(number))) for number in range(40)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 40
    finally:
        stop.set()
        thread.join()


def forked(work: Callable[[], object]) -> int:
    """A child that does something, or is ended by a signal after some seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return child
