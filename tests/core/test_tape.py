"""Tapes give torch's bits, for every elementwise method and any values; what cannot be recorded says so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from sdops.card import Card, cards
from sdops.core import native
from sdops.core.elementwise import (
    above,
    copysign,
    geometric_mean,
    masked,
    maximum,
    minimum,
    power,
    sign_of,
    sqrt,
    where,
    zeros_of,
)
from sdops.core.method import load
from sdops.core.noise import Noise, key_words
from sdops.core.precision import FORMATS
from sdops.core.tape import MOST_REGISTERS, Op, Program, Symbol, UntraceableError, record
from tests.tiny import checkpoint, write

Singles = NDArray[np.float32]

needs_library = pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")

ELEMENTWISE = [card for card in cards().values() if card.execution == "elementwise"]

# What stays with torch, and why.
NOT_RECORDED: dict[str, str] = {}

# Other knobs than the defaults, so that every branch of a method is taken.
KNOBS: dict[str, list[dict[str, Any]]] = {
    "add_opposite": [{"alpha": -0.3}],
    "add_strict_opposite": [{"alpha": 0.7}],
    "clamp": [{"stiffness": 0.3}, {"stiffness": 1.0}],
    "dare_linear": [{"density": 0.0}, {"density": 1.0}, {"density": 0.2, "weights": (0.3, 0.0), "normalize": True}],
    "dare_ties": [{"density": 0.7, "normalize": True, "scale": 0.4}, {"density": 0.3, "weights": (-1.0, 0.1)}],
    "euclidean_add_difference": [{"alpha": 0.0}, {"alpha": 0.3}],
    "geometric_sum": [{"alpha": 0.0}, {"alpha": 1.0}, {"alpha": 0.3}],
    "magmax": [{"scale": 1.0}],
    "multiply_difference": [{"alpha": 0.0, "beta": 0.2}, {"alpha": 1.0, "beta": 1.5}, {"alpha": 0.2}],
    "multiply_quotient": [{"alpha": 0.5}, {"alpha": 2.0}, {"alpha": -0.7}, {"alpha": 0.0}],
    "nearswap": [{"t": 0.1}, {"t": -0.01}],
    "plus_random": [{"alpha": 1.0}],
    "ram": [{"epsilon": 0.0}, {"epsilon": 0.3}],
    "similarity_add_difference": [{"alpha": 0.3, "beta": 0.2}],
    "train_difference": [{"alpha": 0.3}, {"alpha": 1e39}],
}
CASES = [
    pytest.param(card, knobs, id=f"{card.name}-{index}")
    for card in ELEMENTWISE
    if card.name not in NOT_RECORDED
    for index, knobs in enumerate([{}, *KNOBS[card.name]])
]

NASTY = [0.0, -0.0, 1e-45, -1e-45, 1e-39, 1.5, -1.5, 1 / 3, 1e-6, 65504.0, -65504.0, 3e38, -3e38]


def count(card: Card) -> int:
    return int(card.base) + (2 if card.inputs == ["*models"] else len(card.inputs))


def recorded(card: Card, knobs: dict[str, Any], gram: NDArray[np.float64]) -> Program:
    method = load(f"sdops.merges.{card.name}", card.execution, card.needs)
    return record(partial(method.call, method.function, knobs=knobs, gram=gram), count(card))


def played(program: Program, inputs: list[Singles], offset: int = 0) -> Singles | None:
    """float32 results, or None where one of them is not finite."""
    out = np.empty(len(inputs[0]), np.uint32)
    keys = [key_words(3, "w", model, stream) for model, stream in program.draws]
    tape = native.NativeTape(program, ["F32"] * len(inputs), "F32")
    return out.view(np.float32) if tape([x.view(np.uint32) for x in inputs], out, keys, offset) >= 0 else None


def in_torch(
    card: Card, knobs: dict[str, Any], inputs: list[Singles], gram: NDArray[np.float64], offset: int
) -> Singles:
    method = load(f"sdops.merges.{card.name}", card.execution, card.needs)
    tensors = [torch.from_numpy(x.copy()) for x in inputs]
    supplied = {"gram": gram, "noise": Noise(3, "w", offset)}
    return method.call(method.function, *tensors, knobs=knobs, **supplied).numpy()


def check(card: Card, knobs: dict[str, Any], inputs: list[Singles], offset: int = 0) -> None:
    vectors = np.stack([x.astype(np.float64) for x in inputs])
    gram = vectors @ vectors.T
    expected = in_torch(card, knobs, inputs, gram, offset)
    program = recorded(card, knobs, gram)
    found = played(program, inputs, offset)
    if np.isfinite(expected).all():
        assert found is not None
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
    else:
        assert found is None


# --- every method ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", ELEMENTWISE, ids=lambda card: card.name)
def test_a_method_is_recorded_or_declared(card: Card) -> None:
    """A formula that torch alone can evaluate is five times as slow: write it with core.elementwise, or say why not."""
    if card.name in NOT_RECORDED:
        with pytest.raises(UntraceableError):
            recorded(card, {}, np.eye(count(card)))
    else:
        assert recorded(card, {}, np.eye(count(card))).code


@needs_library
@pytest.mark.parametrize(("card", "knobs"), CASES)
def test_bits_are_those_of_torch_on_fine_tunes(card: Card, knobs: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    base = rng.standard_normal(3001).astype(np.float32)
    inputs = [(base + 0.1 * rng.standard_normal(len(base))).astype(np.float32) for _ in range(count(card))]
    inputs[-1][::7] = inputs[0][::7]
    check(card, knobs, inputs, offset=5)


@needs_library
@pytest.mark.parametrize(("card", "knobs"), CASES)
def test_bits_are_those_of_torch_on_nasty_values(card: Card, knobs: dict[str, Any]) -> None:
    """All combinations, one by one where torch finds that some have no finite result."""
    grid = np.stack(np.meshgrid(*[np.float32(NASTY)] * count(card)), axis=-1).reshape(-1, count(card))
    inputs = [np.ascontiguousarray(column) for column in grid.T]
    expected = in_torch(card, knobs, inputs, np.eye(count(card)), 0)
    fine = np.isfinite(expected)
    program = recorded(card, knobs, np.eye(count(card)))
    if "noise" not in card.needs:  # which goes by place
        found = played(program, [x[fine] for x in inputs])
        assert found is not None
        assert np.array_equal(found.view(np.uint32), expected[fine].view(np.uint32))
    for index in np.flatnonzero(~fine)[:50]:
        assert played(program, [x[index : index + 1] for x in inputs], int(index)) is None


@needs_library
@pytest.mark.parametrize("card", [card for card in ELEMENTWISE if card.name not in NOT_RECORDED], ids=lambda c: c.name)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_bits_are_those_of_torch_on_any_values(card: Card, data: st.DataObject) -> None:
    shape = (count(card), data.draw(st.integers(1, 40)))
    elements = st.floats(width=32, allow_nan=False, allow_infinity=False)
    check(card, {}, list(data.draw(hnp.arrays(np.float32, shape, elements=elements))), data.draw(st.integers(0, 9)))


# --- the operations --------------------------------------------------------------------------------------------------


def formula(of: Callable[..., Any], number: int) -> Program:
    def without_noise(*inputs: Symbol, **_: object) -> Any:
        return of(*inputs)

    return record(without_noise, number)


FORMULAS = {
    "operators": lambda x, y: ((x + y) - 3 * x) * y / (abs(y) + 1) - -x,
    "numbers first": lambda x, y: 1 - x + 2 / (abs(y) + 1),
    "the same twice": lambda x, y: (x + y) * (y + x) + x * 1.0 / 1.0,
    "comparisons": lambda x, y: where((x < y) & ~(x <= -1) | (y > 1e30), x, where(x >= y, y, -x)),
    "masks": lambda x, y: masked(x, y > 0) + above(y, 0.25) - zeros_of(x),
    "extremes": lambda x, y: minimum(maximum(x, y), 2) - maximum(minimum(x, -y), -0.0),
    "signs": lambda x, y: copysign(x, y) + sign_of(x),
    "other powers": lambda x, y: power(abs(x), 0.3) + power(abs(y) + 1e-30, -1.2) + power(abs(x), 3.5),
    "means": lambda x, y: geometric_mean(abs(x), abs(y), 0.3) + geometric_mean(abs(y) + 1e-30, abs(x), 0.9),
    "powers": lambda x, y: sqrt(abs(x)) + power(abs(y), 2) * power(x, 1) + power(abs(y), 0.5) - power(x, 0),
}


@needs_library
@pytest.mark.parametrize("name", FORMULAS)
def test_every_operation_is_torchs(name: str) -> None:
    grid = np.float32(np.stack(np.meshgrid(NASTY[:-2], NASTY[:-2]), axis=-1).reshape(-1, 2))
    inputs = [np.ascontiguousarray(column) for column in np.tile(grid, (9, 1)).T]
    expected = FORMULAS[name](*(torch.from_numpy(x.copy()) for x in inputs)).numpy()
    found = played(formula(FORMULAS[name], 2), inputs)
    assert found is not None
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("exponent", [0.3, 0.7, 1.5, -0.4, 7.25, -3.0, 1e-3])
def test_powers_are_rounded_as_well_as_float32_can(exponent: float) -> None:
    rng = np.random.default_rng(1)
    bits = np.concatenate(
        [rng.integers(0, 0x7F800000, 100_000), [0, 1, 0x007FFFFF, 0x00800000, 0x7F800000, 0x7FC00000]]
    )
    x = bits.astype(np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        exact = x.astype(np.float64) ** np.float64(np.float32(exponent))
        nearest = exact.astype(np.float32)
    found = power(torch.from_numpy(x), exponent).numpy()
    assert np.array_equal(np.isnan(found), np.isnan(nearest))
    assert np.count_nonzero(found != nearest) - np.isnan(found).sum() <= 3  # where the exact one is close to a tie
    np.testing.assert_array_max_ulp(found[:-1], nearest[:-1], maxulp=1)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.999])
def test_geometric_means_lie_between_and_are_exact_on_equals(alpha: float) -> None:
    x = torch.from_numpy(np.random.default_rng(2).integers(1, 0x7F800000, 50_000).astype(np.uint32).view(np.float32))
    y = x.flip(0)
    mean = geometric_mean(x, y, alpha).double()
    assert (mean >= torch.minimum(x, y) * (1 - 2e-7)).all()
    assert (mean <= torch.maximum(x, y) * (1 + 2e-7)).all()
    normal = x[x > 1e-37]
    assert ((geometric_mean(normal, normal, alpha) - normal).abs() <= 2e-7 * normal).all()


def test_equal_operations_are_done_once_and_unused_ones_never() -> None:
    program = formula(lambda x, y: [(x + y) * (y + x), x / y][0], 2)
    assert [Op(code[0]).name for code in program.code] == ["LOAD", "LOAD", "ADD", "MULTIPLY"]
    assert formula(lambda *x: x[0], 2).code[-1][0] == Op.LOAD  # the other input is checked, too


def test_registers_are_used_again() -> None:
    program = formula(lambda *x: sum(x[1:], x[0]), 500)
    assert max(code[1] for code in program.code) < 4


def test_too_many_values_at_once_are_left_to_torch() -> None:
    def method(*x: Symbol) -> Symbol:
        total = sum(x[1:], x[0])
        return sum((total * y for y in x), total)

    formula(method, MOST_REGISTERS - 10)
    with pytest.raises(UntraceableError):
        formula(method, MOST_REGISTERS + 10)


@pytest.mark.parametrize(
    "method",
    [
        torch.sort,
        torch.abs,
        lambda x: x.sum(),
        lambda x: x if x > 0 else -x,
        lambda x: x == 0,
        lambda x: x + "text",
        lambda x: [x],
    ],
)
def test_what_is_no_operation_on_elements_is_refused(method: Any) -> None:
    with pytest.raises(UntraceableError):
        formula(method, 1)


# --- formats, blocks, random numbers ---------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("size", [1, 8, 511, 512, 513, 3000])
@pytest.mark.parametrize("out_dtype", native.DTYPES)
def test_formats_are_read_and_rounded_as_torch_does(out_dtype: str, size: int) -> None:
    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    rng = np.random.default_rng(size)
    raws = [rng.integers(0, FORMATS[dtype].infinity, size).astype(FORMATS[dtype].raw) for dtype in native.DTYPES]
    raws[2] = np.where(rng.random(size) < 0.9, raws[2] % np.uint32(0x4780_0000), raws[2])  # not all beyond fp16
    tensors = [torch.from_numpy(raw).view(dtypes[name]).float() for raw, name in zip(raws, native.DTYPES, strict=True)]
    wanted = (tensors[0] * 0.25 + tensors[1] * 1e-30) + tensors[2] * 0.5
    expected = wanted.to(dtypes[out_dtype])
    overflow = int(expected.isinf().sum())
    expected = expected.clamp(-FORMATS[out_dtype].largest, FORMATS[out_dtype].largest)
    program = formula(lambda x, y, z: (x * 0.25 + y * 1e-30) + z * 0.5, 3)
    out = np.empty(size, FORMATS[out_dtype].raw)
    assert native.NativeTape(program, native.DTYPES, out_dtype)(raws, out, [], 0) == overflow
    assert np.array_equal(
        out, expected.view(torch.int32 if out_dtype == "F32" else torch.int16).numpy().view(out.dtype)
    )


@needs_library
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_what_is_not_finite_is_told(dtype: str) -> None:
    out = np.empty(1000, np.uint16)
    tape = native.NativeTape(formula(lambda *x: x[0], 2), [dtype, dtype], "F16")
    for place in (0, 700, 999):
        for bits in (FORMATS[dtype].infinity, FORMATS[dtype].infinity + 1):
            raws = [np.zeros(1000, FORMATS[dtype].raw) for _ in range(2)]
            assert tape(raws, out, [], 0) == 0
            raws[1][place] = bits  # of an input that is not used
            assert tape(raws, out, [], 0) == -1


@needs_library
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 777, 2**34 + 1])
@pytest.mark.parametrize("size", [1, 5, 512, 1203])
def test_random_numbers_are_those_of_noise(offset: int, size: int) -> None:
    program = record(lambda x, noise: noise.uniform(1, like=x, stream=2) + 2 * noise.normal(0, like=x), 1)
    assert program.draws == ((1, 2), (0, 0))
    like = torch.zeros(size)
    noise = Noise(3, "w", offset)
    expected = noise.uniform(1, like, stream=2) + 2 * noise.normal(0, like)
    found = played(program, [np.zeros(size, np.float32)], offset)
    assert found is not None
    assert np.array_equal(found, expected.numpy())


def test_elementwise_and_gram_methods_import_no_torch() -> None:
    names = [f"sdops.merges.{card.name}" for card in cards().values() if card.execution in ("elementwise", "gram")]
    code = f"import sys, sdops.core.merged, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_library
@pytest.mark.parametrize("name", ["train-difference", "multiply-difference", "nearswap", "slerp", "karcher"])
def test_a_merge_imports_no_torch(name: str, tmp_path: Path) -> None:
    for seed, file in enumerate("abc"):
        write(tmp_path / f"{file}.safetensors", checkpoint(seed))
    files = [str(tmp_path / f"{file}.safetensors") for file in ("ab" if name in ("nearswap", "slerp") else "abc")]
    code = "import sys; from sdops.commands.main import main; sys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    arguments = ["merge", *files, "-m", name, "-o", str(tmp_path / "out.safetensors"), "-q"]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
