"""Damage is found and named; what is only odd is told and not blamed."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from sdops.errors import FormatError
from sdops.verbs.verify import verify

IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def half(*values: float) -> tuple[str, np.ndarray]:
    return "F16", np.array(values, np.float16)


def test_a_sound_file(write):
    path = write("m.safetensors", {"a": half(1, -2.5, 6e-8), "z": half(0, 0), IDS: ("I64", np.arange(77))})
    report = verify(path)
    (data,) = report.data["files"]
    assert not report.failed
    assert report.result == [f"{path}: ok"]
    assert data["damage"] == []
    assert data["all_zero"] == ["z"]
    assert data["subnormal"] == 1
    assert data["position_ids"] == {IDS: "ok"}
    assert data["floats"]["a"] == {"max_abs": 2.5, "nan": 0, "inf": 0, "subnormal": 1}
    assert (data["tensors"], data["bytes"]) == (3, 77 * 8 + 10)


def test_nan_and_infinity_are_damage(write):
    path = write("m.safetensors", {"bad.weight": half(np.nan, np.inf, -np.inf, 3), "good": half(1)})
    report = verify(path)
    assert report.failed
    assert report.data["files"][0]["damage"] == ["bad.weight: 1 NaN and 2 infinite of 4"]
    assert report.data["files"][0]["floats"]["bad.weight"]["max_abs"] == 3.0
    assert "bad.weight  1 NaN and 2 infinite of 4" in report.text()
    json.dumps(report.as_dict(), allow_nan=False)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F8_E5M2", "F32", "F64"])
def test_nan_in_every_float_dtype(dtype, write):
    word = {"BF16": np.uint16, "F32": np.uint32, "F64": np.uint64}.get(dtype, np.uint8)
    data = np.zeros(9, word)
    data[4] = np.iinfo(word).max
    assert verify(write("m.safetensors", {"x": (dtype, data)})).failed


def test_broken_position_ids_are_damage_and_floats_a_warning(write):
    ids = np.arange(77)
    assert not verify(write("f.safetensors", {IDS: ("F16", ids.astype(np.float16))})).failed
    warnings = verify(write("g.safetensors", {IDS: ("F16", ids.astype(np.float16))})).warnings
    assert warnings == [f"`{IDS}` in `g.safetensors` is right, but stored as F16"]
    report = verify(write("b.safetensors", {IDS: ("I64", np.maximum(ids - 1, 0))}))
    assert report.data["files"][0]["damage"] == [f"{IDS}: broken: 76 of 77 are wrong"]


def test_a_flipped_bit_is_found_by_the_stored_hash(write):
    tensors = {"x": ("F32", np.linspace(0, 1, 1000, dtype=np.float32))}
    plain = write("plain.safetensors", tensors)
    raw = plain.read_bytes()
    true = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    path = write("m.safetensors", tensors, {"modelspec.hash_sha256": f"0x{true}", "sshs_legacy_hash": "12345678"})
    assert not verify(path).failed
    content = bytearray(path.read_bytes())
    content[-700] ^= 1
    path.write_bytes(content)
    report = verify(path)
    assert report.data["files"][0]["damage"] == ["modelspec.hash_sha256: is not the hash of the tensors"]


def test_many_findings_are_cut_in_the_table_and_whole_in_the_data(write):
    path = write("m.safetensors", {f"t{i:03}": half(np.nan) for i in range(50)})
    report = verify(path)
    assert "... and 30 more" in report.text()
    assert "t049" not in report.text()
    assert len(report.data["files"][0]["damage"]) == 50


def test_a_damaged_structure(write, tmp_path):
    path = write("m.safetensors", {"a": half(1, 2)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="cut short"):
        verify(path)
    good = write("good.safetensors", {"a": half(1, 2)})
    report = verify(path, good)
    assert report.failed
    assert ["error" in data for data in report.data["files"]] == [True, False]


def test_hostile_names_stay_names(write):
    name = "\x1b[2J[/foo]\r\u202e"
    report = verify(write("m.safetensors", {name: half(np.nan), "ok": half(1)}))
    assert list(report.data["files"][0]["floats"]) == [name, "ok"]
    assert all(line.isprintable() for line in report.text().splitlines())
    assert "\\x1b[2J[/foo]\\r\\u202e" in report.text()


def test_empty_tensors_and_a_file_without_floats(write):
    path = write("m.safetensors", {"v_pred": ("F32", np.zeros(0, "f4")), "i": ("I64", np.arange(3))})
    report = verify(path)
    assert not report.failed
    assert report.data["files"][0]["all_zero"] == []
