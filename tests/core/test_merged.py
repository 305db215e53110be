"""A plan as a Source: the four actions, any range of bytes, errors with names, counts."""

from __future__ import annotations

import numpy as np
import pytest

from sdops.core.exact import PIECE
from sdops.core.merged import Merged
from sdops.core.method import Method, load
from sdops.core.plan import Input, Plan, Step, Steps
from sdops.core.source import read
from sdops.core.spec import Spec
from sdops.errors import FormatError
from tests.tiny import Memory, Model, encoded, numbers

RNG = np.random.default_rng(1)
SUM = load("sdops.merges.weighted_sum", "linear", frozenset())


def merged(models: list[Model], dtype: str, *, method: Method = SUM, **knobs: object) -> Merged:
    """All tensors of the first model merged with the others'."""
    sources = [Memory(model, name) for model, name in zip(models, "abc", strict=False)]
    steps = {}
    for key, spec in sources[0].specs.items():
        inputs = tuple(Input(source, key, index) for index, source in enumerate(sources))
        steps[key] = Step(Spec(dtype, spec.shape), "merge", inputs, knobs)
    return Merged(Plan("out", Steps(steps)), method)


def pair(size: int, dtype: str = "F16") -> list[Model]:
    base = RNG.standard_normal(size)
    return [{"w": encoded(base + 0.01 * RNG.standard_normal(size), dtype)} for _ in range(2)]


def test_any_range_of_bytes() -> None:
    models = pair(2 * PIECE + 77)
    source = merged(models, "F16", alpha=0.25)
    a, b = (numbers(model["w"]) for model in models)
    whole = bytes(read(source, "w"))
    assert whole == encoded(a + 0.25 * (b - a), "F16")[1].tobytes()
    for first, count in ((0, 1), (5, PIECE), (PIECE - 1, 2), (2 * PIECE, 77), (1, 2 * PIECE + 76)):
        buffer = bytearray(2 * count)
        source.read_into("w", 2 * first, memoryview(buffer))
        assert buffer == whole[2 * first : 2 * (first + count)]


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_portions_are_whole_elements(dtype: str) -> None:
    source = merged(pair(10), dtype, alpha=0.5)
    assert source.piece_bytes("w") == PIECE * {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}[dtype]
    assert source.splits("w")


def test_copies_casts_and_values() -> None:
    model = {"w": encoded([1.0, 1e5, -3.0], "F32")}
    item = Input(Memory(model), "w", 0)
    steps = {
        "copy": Step(item.spec, "copy", (item,)),
        "cast": Step(Spec("F16", (3,)), "cast", (item,)),
        "value": Step(Spec("I64", (2,)), "value", value=bytes(range(16))),
    }
    source = Merged(Plan("out", Steps(steps)), SUM)
    assert bytes(read(source, "copy")) == model["w"][1].tobytes()
    assert np.frombuffer(read(source, "cast"), "f2").tolist() == [1.0, 65504.0, -3.0]
    assert bytes(read(source, "value")) == bytes(range(16))
    assert source.overflows == {"cast": 1}
    buffer = bytearray(4)
    source.read_into("value", 3, memoryview(buffer))
    assert buffer == bytes([3, 4, 5, 6])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_named(value: float) -> None:
    models = pair(100)
    models[1]["w"][1].view("f2")[7] = value
    with pytest.raises(FormatError, match=rf"`w` of `b` holds 1 {'NaN' if np.isnan(value) else 'infinite'} value"):
        read(merged(models, "F16", alpha=0.5), "w")
    step = Step(Spec("F32", (100,)), "cast", (Input(Memory(models[1], "b"), "w", 1),))
    with pytest.raises(FormatError, match="`w` of `b`"):
        read(Merged(Plan("out", Steps({"w": step})), SUM), "w")


def test_an_input_without_weight_is_not_looked_at() -> None:
    models = pair(100)
    models[0]["w"][1].view("f2")[7] = np.nan
    source = merged(models, "F16", alpha=1.0)
    assert bytes(read(source, "w")) == models[1]["w"][1].tobytes()


def test_overflow_is_counted_once_per_element() -> None:
    models: list[Model] = [{"w": encoded([6e4, 1.0, -6e4], "F16")}, {"w": encoded([-6e4, 1.0, 6e4], "F16")}]
    source = merged(models, "F16", alpha=-1.0)
    assert np.frombuffer(read(source, "w"), "f2").tolist() == [65504.0, 1.0, -65504.0]
    assert source.overflows == {"w": 2}


def test_steps_of_equal_knobs_share_their_coefficients() -> None:
    model = {name: encoded(RNG.standard_normal(5), "F16") for name in "xyz"}
    source = merged([model, model], "F16", alpha=0.3)
    for key in model:
        read(source, key)
    assert len(source._sums) == 1


def test_empty_and_single() -> None:
    models: list[Model] = [
        {"none": encoded(np.zeros((0, 3)), "F16"), "one": encoded(value, "F16")} for value in (1.0, 2.0)
    ]
    source = merged(models, "F16", alpha=0.5)
    assert read(source, "none") == b""
    assert np.frombuffer(read(source, "one"), "f2").tolist() == [1.5]
