"""Models in two layouts are compared as if they were in one: nothing differs, or what was changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdops.archs.detect import detect
from sdops.formats import open_source
from sdops.layouts.tables import Part, made_of
from sdops.verbs.diff import diff
from tests import tiny


def apply(part: Part, array: np.ndarray) -> np.ndarray:
    """What a part is, in plain numpy."""
    if part.share:
        start, stop, total = part.share
        array = array[len(array) * start // total : len(array) * stop // total]
    if part.operation == "swap":
        return np.concatenate([array[len(array) // 2 :], array[: len(array) // 2]])
    if part.operation == "transpose":
        return array.T
    if part.operation == "conv":
        return array[..., None, None]
    return array.reshape(array.shape[:2]) if part.operation == "linear" and array.ndim == 4 else array


def put_together(parts: tuple[Part, ...], arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.atleast_1d(apply(part, arrays[part.key])) for part in parts])


CASES = [
    ("sdxl", "unet", "diffusers"),
    ("sd15", "vae", "diffusers"),
    ("sdxl", "clip_g", "hf"),
    ("flux1-dev", "transformer", "diffusers"),
    ("sd35-medium", "transformer", "diffusers"),
]


@pytest.mark.parametrize(("name", "component", "layout"), CASES)
def test_a_component_in_another_layout_is_the_same(name, component, layout, small_checkpoint, tmp_path):
    path = small_checkpoint(name, dtype="F16")
    other, converted = converted_component(path, component, layout)
    there = tiny.write(tmp_path / "converted.safetensors", other)
    for a, b, found_as in ((path, there, converted), (there, path, len(other))):
        report = diff(a, b)
        assert report.data["tensors"]["identical"] == found_as
        assert report.data["tensors"]["changed"] == report.data["tensors"]["shape"] == 0
        assert "layout" in report.data["respelled"][component]
    key = next(key for key, tensor in other.items() if tensor[0] == "F16" and np.size(tensor[1]) > 8)
    other[key] = ("F16", other[key][1] + np.float16(1))
    report = diff(path, tiny.write(tmp_path / "other.safetensors", other))
    assert report.data["tensors"]["changed"] == 1
    assert report.data["tensors"]["identical"] == converted - 1


def converted_component(path: Path, name: str, layout: str) -> tuple[tiny.Model, int]:
    """A component in another layout, and how many of its tensors went into it."""
    specs = open_source(path).specs
    part = detect(specs).component(name)
    assert part is not None
    arrays = {key.removeprefix(part.prefix): tensor[1] for key, tensor in tiny.load(path).items() if key in part.keys}
    made = made_of(part.family, name, part.layout, layout, arrays)
    used = {piece.key for pieces in made.values() for piece in pieces}
    there = "unet." if name == "unet" else ""  # shrunk as it is, it might be taken for another model without it
    return {there + key: ("F16", put_together(pieces, arrays)) for key, pieces in made.items()}, len(used)
