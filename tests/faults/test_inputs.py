"""Inputs that are damaged, or become so while they are read."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import sdops
from sdops.errors import FormatError
from tests.faults.cli import end, leftovers, merge, save, start, stop_while_writing


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def touch(path: Path) -> None:
    path.touch()


def write(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x00\x3c")


def replace(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(("which", "options"), [(0, []), (1, ["--no-hash"])], ids=["a, hashed", "b, not hashed"])
@pytest.mark.parametrize("change", [cut, touch, write, replace, remove])
def test_an_input_changes_while_it_is_read(
    change: Callable[[Path], None], which: int, options: list[str], large: tuple[Path, Path], folder: Path
) -> None:
    child = start(*large, "-o", "out.safetensors", *options)
    stop_while_writing(child, folder)
    change(large[which])
    child.send_signal(signal.SIGCONT)
    ended = end(child)
    assert ended.code == 1
    assert f"`{large[which]}`" in ended.err
    assert any(what in ended.err for what in ("changed while", "was cut short", "went away", "there is no file"))
    assert list(folder.iterdir()) == []


def shorter(data: bytes) -> bytes:
    return data[:-100]


def longer(data: bytes) -> bytes:
    return data + b"\0"


def inside_the_header(data: bytes) -> bytes:
    return data[:50]


def flipped_brace(data: bytes) -> bytes:
    return data[:8] + b"[" + data[9:]


def flipped_dtype(data: bytes) -> bytes:
    return data.replace(b'"F16"', b'"F17"', 1)


def flipped_shape(data: bytes) -> bytes:
    return data.replace(b"[40,30]", b"[40,31]", 1)


def huge_length(data: bytes) -> bytes:
    return b"\xff" * 8 + data[8:]


def empty(data: bytes) -> bytes:
    return b""


def zeros(data: bytes) -> bytes:
    return bytes(len(data))


DAMAGES = [shorter, longer, inside_the_header, flipped_brace, flipped_dtype, flipped_shape, huge_length, empty, zeros]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_input_is_refused_by_name(
    damage: Callable[[bytes], bytes], pair: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(damage(pair[1].read_bytes()))
    ended = merge(pair[0], bad, "-o", "out.safetensors")
    assert ended.code == 1
    assert ended.err.startswith("error: ")
    assert f"`{bad}`" in ended.err
    assert "Traceback" not in ended.err
    assert list(folder.iterdir()) == []


def with_a_bad_number(path: Path, value: float) -> Path:
    tensors = {f"layer{i}.weight": np.ones((40, 30), np.float16) for i in range(6)}
    tensors["layer3.weight"][39, 29] = value
    return save(path, tensors)


@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (-np.inf, "infinite")])
def test_a_number_that_is_none_is_named(
    value: float, name: str, pair: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    ended = merge(pair[0], with_a_bad_number(tmp_path / "bad.safetensors", value), "-o", "out.safetensors")
    assert ended.code == 1
    assert f"`layer3.weight` of `bad.safetensors` holds 1 {name} value\n" in ended.err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("method", ["slerp", "cosine-a", "magmax"])
def test_methods_of_torch_name_it_as_well(method: str, pair: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    models = [pair[0], with_a_bad_number(tmp_path / "bad.safetensors", np.nan)]
    base = pair[1] if method == "magmax" else None
    with pytest.raises(FormatError, match=r"`layer3.weight` of `bad.safetensors` holds 1 NaN value"):
        sdops.merge(*models, method=method, base=base, output="out.safetensors")
    assert list(folder.iterdir()) == []


def test_a_missing_input_is_named(pair: tuple[Path, Path], folder: Path) -> None:
    ended = merge(pair[0], pair[1].with_name("c.safetensors"), "-o", "out.safetensors")
    assert ended.code == 1
    assert f"there is no file `{pair[1].with_name('c.safetensors')}`" in ended.err
    assert leftovers(folder) == []
