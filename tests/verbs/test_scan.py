"""Counts from bit patterns against torch, over every pattern of the narrow dtypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sdops.report import silent
from sdops.verbs import _scan
from sdops.verbs._scan import LAYOUTS, count, magnitude_value, scan

TORCH = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
}


def every_pattern(dtype: str) -> np.ndarray:
    word = np.dtype(LAYOUTS[dtype].word)
    return np.arange(2 ** (8 * word.itemsize), dtype=np.uint32).astype(word)


@pytest.mark.parametrize("dtype", TORCH)
def test_every_single_pattern(dtype):
    patterns = every_pattern(dtype)
    numbers = torch.from_numpy(patterns.copy()).view(TORCH[dtype]).double()
    step = max(1, len(patterns) // 700)
    for index in [*range(0, len(patterns), step), LAYOUTS[dtype].infinity % len(patterns)]:
        x = numbers[index]
        tally = count(patterns[index : index + 1].view(np.uint8), dtype)
        assert tally.nan == int(x.isnan())
        assert tally.inf == int(x.isinf())
        if x.isfinite():
            assert magnitude_value(tally.top, dtype) == abs(x.item())


@pytest.mark.parametrize("dtype", TORCH)
def test_all_patterns_at_once(dtype):
    patterns = every_pattern(dtype)
    numbers = torch.from_numpy(patterns.copy()).view(TORCH[dtype]).double()
    tally = count(patterns.view(np.uint8), dtype)
    assert tally.nan == int(numbers.isnan().sum())
    assert tally.inf == int(numbers.isinf().sum())
    assert magnitude_value(tally.top, dtype) == numbers[numbers.isfinite()].abs().max().item()
    if dtype == "F16":
        tiny = torch.finfo(torch.float16).smallest_normal
        assert tally.subnormal == int(((numbers != 0) & (numbers.abs() < tiny)).sum())


@pytest.mark.parametrize(("dtype", "kind"), [("F32", np.float32), ("F64", np.float64), ("F16", np.float16)])
@given(data=st.data())
def test_numpy_floats(dtype, kind, data):
    x = data.draw(arrays.arrays(kind, st.integers(1, 50), elements={"allow_nan": True, "allow_infinity": True}))
    tally = count(x.view(np.uint8), dtype)
    assert tally.nan == np.isnan(x).sum()
    assert tally.inf == np.isinf(x).sum()
    assert magnitude_value(tally.top, dtype) == np.abs(x[np.isfinite(x)]).max(initial=0)


@pytest.mark.parametrize("piece", [8, 16, 64, 1 << 18])
@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_and_threads_do_not_matter(piece, threads, memory, monkeypatch):
    monkeypatch.setattr(_scan, "_PIECE", piece)
    monkeypatch.setattr(_scan, "_THREADS", threads)
    x = np.linspace(-3, 3, 1001, dtype=np.float16)
    x[[5, 700]], x[800], x[900] = np.nan, -np.inf, 1e-6
    source = memory({"a": ("F16", x), "b": ("I64", np.arange(77)), "c": ("F32", np.zeros(3, "f4"))})
    tallies = scan(source, silent)
    assert tallies["a"] == count(x.view(np.uint8), "F16")
    assert (tallies["a"].nan, tallies["a"].inf, tallies["a"].subnormal) == (2, 1, 1)
    assert tallies["c"].top == 0
    assert set(tallies) == {"a", "c"}


def test_an_error_in_one_thread_ends_all(memory):
    class Broken(memory):
        def read_into(self, *piece):
            raise OSError(f"gone: {piece}")

    with pytest.raises(OSError, match="gone"):
        scan(Broken({"a": ("F32", np.zeros(10_000_000, "f4"))}), silent)
