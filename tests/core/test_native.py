"""Compiled code is there where it can be, steps aside where it cannot, and gives numpy's bits."""

from __future__ import annotations

import ctypes
import platform
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from sdops.core import native
from sdops.core.casting import cast
from sdops.core.exact import PIECE, ExactSum, Scratch
from sdops.core.gram import add_inner
from sdops.core.noise import LOW_32, Noise, philox
from sdops.core.precision import FORMATS, decode

CAN_COMPILE = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") and shutil.which("cc")
needs_library = pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")


@pytest.mark.skipif(not CAN_COMPILE, reason="no C compiler for this platform")
def test_installing_with_a_compiler_brings_the_compiled_code() -> None:
    assert native.library() is not None, "reinstall: `pip install -e .` compiles sdops/core/exact.c"


def test_the_environment_can_switch_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDOPS_NATIVE", "0")
    assert native.library.__wrapped__() is None


@needs_library
def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    assert native.library.__wrapped__() is None


def test_a_file_that_is_no_library_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libexact.so").write_bytes(b"damaged")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native.library.__wrapped__() is None


def random_bits(rng: np.random.Generator, dtype: str, count: int) -> np.ndarray:
    """Every finite bit pattern is as likely as any other."""
    target = FORMATS[dtype]
    bits = rng.integers(0, 2 * target.sign, count, dtype=np.uint64)
    magnitude = np.minimum(bits & (target.sign - 1), target.infinity - 1)
    return (magnitude | (bits & target.sign)).astype(target.raw)


@needs_library
@pytest.mark.parametrize("out_dtype", native.DTYPES)
@pytest.mark.parametrize("dtypes", [["F16", "F16"], ["BF16", "BF16"], ["F32", "F32"], ["F16", "F32", "BF16"], ["F32"]])
@pytest.mark.parametrize("size", [1, 7, 511, 513, 5000])
def test_same_bits_as_numpy_on_random_bit_patterns(dtypes: list[str], out_dtype: str, size: int) -> None:
    rng = np.random.default_rng(size)
    raws = [random_bits(rng, dtype, size) for dtype in dtypes]
    coefficients = [Fraction(float(np.float32(c))) for c in rng.uniform(-1, 1, len(dtypes))]
    combine = ExactSum(coefficients, dtypes, out_dtype)
    assert combine.native is not None
    results = []
    for _ in range(2):
        out = np.empty(size, FORMATS[out_dtype].raw)
        results.append((out, combine(raws, out, Scratch())))
        combine.native = None  # the second time with numpy
    assert results[0][1] == results[1][1]
    assert np.array_equal(results[0][0], results[1][0])


@needs_library
@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.0005, 1.7, -0.4])
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_same_bits_as_numpy_on_a_fine_tune(dtype: str, alpha: float) -> None:
    rng = np.random.default_rng(1)
    base = (rng.standard_normal(PIECE) * 0.03).astype(np.float32)
    tuned = base + (rng.standard_normal(PIECE) * 0.001).astype(np.float32)
    shift = {"F16": None, "BF16": 16, "F32": 0}[dtype]
    raws = [
        x.astype(np.float16).view(np.uint16)
        if shift is None
        else (x.view(np.uint32) >> shift).astype(FORMATS[dtype].raw)
        for x in (base, tuned)
    ]
    exact = Fraction(float(np.float32(alpha)))
    combine = ExactSum([1 - exact, exact], [dtype, dtype], dtype)
    compiled, plain = np.empty_like(raws[0]), np.empty_like(raws[0])
    combine(raws, compiled, Scratch())
    combine.native = None
    combine(raws, plain, Scratch())
    assert np.array_equal(compiled, plain)


@needs_library
def test_a_wrong_sum_would_be_seen() -> None:
    """The same call with plain addition where compensation is needed gives other bits."""
    rng = np.random.default_rng(2)
    raws = [random_bits(rng, "F32", 4096) for _ in range(2)]
    compiled = native.make_sum([(0, 0.3), (1, 0.7)], ["F32", "F32"], "F32")
    assert compiled is not None
    room = np.empty(4096, np.uint32)
    careful, careless = np.empty(4096, np.uint32), np.empty(4096, np.uint32)
    compiled(raws, careful, room, exact=False)
    compiled(raws, careless, room, exact=True)
    assert not np.array_equal(careful, careless)


@needs_library
def test_bounds() -> None:
    functions = native.library()
    assert isinstance(functions, ctypes.CDLL)
    assert native.bounds(np.array([0, 0x8000], np.uint16), "F16") == (0, 0xFFFFFFFF)
    assert native.bounds(np.array([0x8001, 0x3C00, 0], np.uint16), "BF16") == (0x3C00, 1)
    assert native.bounds(np.array([0xFF800000, 5, 0x80000007], np.uint32), "F32") == (0x7F800000, 5)
    assert native.bounds(np.zeros(1, np.uint64), "F64") is None


@needs_library
@pytest.mark.parametrize("first", [0, 3, 2**32 - 2])
def test_philox_words_are_those_of_numpy(first: int) -> None:
    compiled = np.empty((150, 4), np.uint32)
    assert native.philox((0xDEADBEEF, 7), first, compiled)
    counters = np.arange(first, first + 150, dtype=np.uint64)
    counter = np.zeros((4, 150), np.uint32)
    counter[0], counter[1] = counters & np.uint64(LOW_32), counters >> np.uint64(32)
    assert np.array_equal(compiled, np.stack(philox(counter, (0xDEADBEEF, 7)), axis=1))


@needs_library
@pytest.mark.parametrize("first", [0, 3, 2**32 - 2])
def test_normal_numbers_are_those_of_numpy(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    noise, like = Noise(3, "w", offset=4 * first + 1), torch.empty(200_003)
    compiled = noise.normal(1, like)
    monkeypatch.setattr(native, "library", lambda: None)
    assert torch.equal(compiled.view(torch.int32), noise.normal(1, like).view(torch.int32))


@needs_library
@pytest.mark.parametrize("size", [1, 8, 511, 5000])
def test_inner_products(size: int) -> None:
    rng = np.random.default_rng(size)
    dtypes = ["F16", "F32", "BF16"]
    raws = [
        rng.standard_normal(size).astype(np.float16).view(np.uint16),
        rng.standard_normal(size).astype(np.float32).view(np.uint32),
        (rng.standard_normal(size).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16),
    ]
    gram = np.zeros((3, 3))
    assert native.inner(raws, dtypes, gram)
    values = np.stack([decode(raw, dtype) for raw, dtype in zip(raws, dtypes, strict=True)])
    expected = np.tril(values @ values.T)
    assert np.allclose(gram, expected, rtol=0, atol=size * 2.0**-52 * np.abs(values).max() ** 2)
    plain = np.zeros((3, 3))
    add_inner(list(values), plain)
    assert np.array_equal(gram, plain)
    assert not native.inner([np.zeros(1, np.uint64)], ["F64"], gram)


@needs_library
@pytest.mark.parametrize("target", native.DTYPES)
@pytest.mark.parametrize("source", native.DTYPES)
def test_casts_are_those_of_numpy(source: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_bits(np.random.default_rng(3), source, 200_000)  # finite: the rest is not for compiled code
    results = []
    for _ in range(2):
        out = np.empty(len(raw), FORMATS[target].raw)
        results.append((out, cast(raw, source, out, target)))
        monkeypatch.setattr(native, "library", lambda: None)
    assert results[0][1] == results[1][1]
    assert np.array_equal(results[0][0], results[1][0])
