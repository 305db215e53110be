"""Tensors cast while they are read: the same bytes however they are read, counted once, by any number of workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sdops.core import run as module
from sdops.core.cast_view import PIECE, Cast, castable
from sdops.core.casting import Counts
from sdops.core.run import run
from sdops.core.sink import SafetensorsSink
from sdops.core.source import read
from sdops.core.spec import Spec
from sdops.errors import UsageError
from tests import tiny
from tests.tiny import Memory

RNG = np.random.default_rng(0)
LARGE = (RNG.standard_normal((3, PIECE + 7)) * 10).astype("f4")
LARGE[1, 5], LARGE[2, -1] = 1e6, -70000
MODEL: tiny.Model = {
    "large": ("F32", LARGE),
    "half": ("F16", np.array([1, -2, np.inf, np.nan], "f2")),
    "double": ("F64", np.array([1 / 3, 1e9])),
    "ids": ("I64", np.arange(9)),
    "kept": ("F32", np.ones((2, 2), "f4")),
}
DTYPES = {"large": "F16", "half": "BF16", "double": "F32", "kept": "F32"}


def test_what_is_named_is_cast_and_the_rest_is_not():
    source = Memory(MODEL)
    view = Cast(source, DTYPES)
    assert {key: spec.dtype for key, spec in view.specs.items()} == {
        "large": "F16", "half": "BF16", "double": "F32", "ids": "I64", "kept": "F32",
    }  # fmt: skip
    assert all(view.specs[key].shape == source.specs[key].shape for key in MODEL)
    large = np.frombuffer(read(view, "large"), "f2")
    np.testing.assert_array_equal(large, np.clip(LARGE, -65504, 65504).astype("f2").reshape(-1))
    assert np.frombuffer(read(view, "double"), "f4").tolist() == MODEL["double"][1].astype("f4").tolist()
    assert read(view, "ids") == read(source, "ids")
    read(view, "half")
    assert view.counts == {"large": Counts(2, 0, 0), "half": Counts(0, 1, 1)}


@pytest.mark.parametrize("seed", [None, 3])
def test_any_part_may_be_read(seed):
    view = Cast(Memory(MODEL), DTYPES, seed=seed)
    whole = read(view, "large")
    for start, count in ((0, 2), (2, 6), (view.piece_bytes("large") - 4, 100), (len(whole) - 8, 8)):
        part = bytearray(count)
        view.read_into("large", start, memoryview(part))
        assert part == whole[start : start + count]


def test_random_rounding_depends_on_seed_and_name():
    same = {"a": MODEL["large"], "b": MODEL["large"]}
    first, again, other = (Cast(Memory(same), dict.fromkeys(same, "BF16"), seed=seed) for seed in (1, 1, 2))
    assert read(first, "a") == read(again, "a")
    assert len({bytes(read(first, "a")), bytes(read(first, "b")), bytes(read(other, "a"))}) == 3


def test_workers_do_not_change_the_bytes_or_the_counts(tmp_path: Path, monkeypatch):
    results = []
    monkeypatch.setattr(module, "FORK_BYTES", 0)
    for jobs, forks in ((1, False), (3, False), (2, True)):
        monkeypatch.setattr(module, "can_fork", lambda forks=forks: forks)
        view = Cast(Cast(Memory(MODEL), DTYPES), {"kept": "F16"})
        with SafetensorsSink(tmp_path / "out", view.specs, {}, force=True) as sink:
            run(view, sink, jobs=jobs)
            sink.commit()
        inner = view.source
        assert isinstance(inner, Cast)
        results.append(((tmp_path / "out").read_bytes(), inner.counts, view.counts))
    assert results[0] == results[1] == results[2]
    assert results[0][1] == {"large": Counts(2, 0, 0), "half": Counts(0, 1, 1)}


def test_portions_fit_those_of_the_source():
    class Picky(Memory):
        def piece_bytes(self, _: str) -> int:
            return 4000

    view = Cast(Picky(MODEL), DTYPES)
    assert (view.piece_bytes("large"), view.piece_bytes("ids")) == (2000, 4000)
    assert not view.forks
    assert Cast(Memory(MODEL), DTYPES).forks
    assert read(view, "large") == read(Cast(Memory(MODEL), DTYPES), "large")


@pytest.mark.parametrize("dtypes", [{"ids": "F16"}, {"large": "I64"}, {"large": "F8_E4M3FNUZ"}])
def test_what_cannot_be_cast_is_refused(dtypes):
    with pytest.raises(UsageError, match="cannot become"):
        Cast(Memory(MODEL), dtypes)


def test_integers_markers_and_empty_tensors_are_left_alone():
    assert castable("a.weight", Spec("F32", (3,)))
    assert castable("a.weight", Spec("F8_E4M3", (3, 3)))
    assert castable("scalar", Spec("BF16", ()))
    for key, spec in {
        "ids": Spec("I64", (3,)),
        "v_pred": Spec("F32", (0,)),
        "scaled_fp8": Spec("F8_E4M3", (2,)),
        "a.weight_scale": Spec("F32", ()),
        "a.scale_weight": Spec("F32", (1,)),
    }.items():
        assert not castable(key, spec)


def test_neither_casts_nor_noise_need_torch():
    code = "import sys, sdops.core.cast_view, sdops.core.noise; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
