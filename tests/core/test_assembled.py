"""Tensors put together from ranges: numpy does the same with arrays."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdops.core.assembled import Assembled, Constants, joined, rows
from sdops.core.run import run
from sdops.core.sink import SafetensorsSink
from sdops.core.source import read
from sdops.core.spec import Spec
from sdops.errors import MismatchError
from tests import tiny

NUMPY = {"F64": "u8", "F32": "u4", "F16": "u2", "U8": "u1"}


def memory(*shapes: tuple[int, ...], dtype: str = "F16") -> tuple[tiny.Memory, list[np.ndarray]]:
    """Tensors `0`, `1` ... whose elements are all different."""
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 250, shape).astype(NUMPY[dtype]) for shape in shapes]
    return tiny.Memory({str(i): (dtype, array) for i, array in enumerate(arrays)}), arrays


def pieces(source, key: str, cuts: list[int]) -> bytes:
    """The tensor, read in pieces that end at these places."""
    size = source.specs[key].nbytes
    edges = [0, *sorted({cut % (size + 1) for cut in cuts}), size]
    out = bytearray(size)
    for start, stop in pairwise(edges):
        source.read_into(key, start, memoryview(out)[start:stop])
    return bytes(out)


@given(
    dtype=st.sampled_from(list(NUMPY)),
    groups=st.integers(1, 4),
    height=st.integers(1, 4),
    rest=st.lists(st.integers(1, 4), max_size=2),
    cuts=st.lists(st.integers(0, 500), max_size=4),
)
def test_what_is_split_and_joined_is_the_same(dtype, groups, height, rest, cuts):
    source, (array,) = memory((groups * height, *rest), dtype=dtype)
    shares = {str(i): rows(source, "0", (i, i + 1, groups)) for i in range(groups)}
    split = Assembled("split", shares, {})
    for i in range(groups):
        assert pieces(split, str(i), cuts) == array[i * height : (i + 1) * height].tobytes()
        assert split.specs[str(i)].shape == (height, *rest)
    whole = Assembled("whole", {"w": joined([rows(split, str(i)) for i in range(groups)])}, {})
    assert whole.specs["w"] == source.specs["0"]
    assert pieces(whole, "w", cuts) == array.tobytes()


@given(
    dtype=st.sampled_from(list(NUMPY)),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 500), max_size=3),
)
def test_halves_and_matrices_change_places(dtype, height, width, cuts):
    source, (array,) = memory((2 * height, width), dtype=dtype)
    made = Assembled("m", {"s": rows(source, "0", None, "swap"), "t": rows(source, "0", None, "transpose")}, {})
    assert pieces(made, "s", cuts) == np.concatenate([array[height:], array[:height]]).tobytes()
    assert pieces(made, "t", cuts) == array.T.tobytes()
    assert made.specs["t"].shape == array.T.shape
    back = Assembled("b", {"s": rows(made, "s", None, "swap"), "t": rows(made, "t", None, "transpose")}, {})
    assert pieces(back, "s", cuts) == pieces(back, "t", cuts) == array.tobytes()


@pytest.mark.parametrize(
    ("shape", "operation", "wanted"),
    [
        ((4, 3, 1, 1), "linear", (4, 3)),
        ((4, 3, 1), "linear", (4, 3)),
        ((4, 3), "linear", (4, 3)),
        ((4, 3), "conv", (4, 3, 1, 1)),
        ((4, 3, 1, 1), "conv", (4, 3, 1, 1)),
    ],
)
def test_a_convolution_of_one_pixel_is_a_matrix(shape, operation, wanted):
    source, (array,) = memory(shape)
    made = rows(source, "0", None, operation)
    assert made.spec.shape == wanted
    assert made.is_whole == (shape == wanted)
    assert read(Assembled("m", {"m": made}, {}), "m") == array.tobytes()


def test_what_does_not_fit_is_refused():
    source, _ = memory((5, 3), (5, 4), (2, 2, 3, 3))
    for arguments in (("0", (0, 1, 2)), ("0", None, "swap"), ("2", None, "transpose"), ("2", None, "linear")):
        with pytest.raises(MismatchError, match=f"`{arguments[0]}`"):
            rows(source, *arguments)
    with pytest.raises(MismatchError, match="rows of one tensor"):
        joined([rows(source, "0"), rows(source, "1")])


def test_all_numbers_of_threads_write_the_same(tmp_path):
    source, arrays = memory((600, 700), (300, 700))
    made = {
        "joined": joined([rows(source, "0"), rows(source, "1")]),
        "turned": rows(source, "0", None, "transpose"),
        "empty": rows(Constants("c", {"e": (Spec("F16", (0,)), b"")}), "e"),
        "constant": rows(Constants("c", {"e": (Spec("U8", (3,)), b"abc")}), "e"),
    }
    for jobs in (1, 4):
        path = tmp_path / f"{jobs}.safetensors"
        assembled = Assembled("m", made, {})
        with SafetensorsSink(path, assembled.specs, {}, force=False) as sink:
            run(assembled, sink, jobs=jobs)
            sink.commit()
        found = tiny.load(path)
        assert found["joined"][1].tobytes() == np.concatenate(arrays).tobytes()
        assert found["turned"][1].tobytes() == arrays[0].T.tobytes()
        assert found["constant"][1].tobytes() == b"abc"
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "4.safetensors").read_bytes()
    assert not assembled.splits("turned")
    assert assembled.splits("joined")
