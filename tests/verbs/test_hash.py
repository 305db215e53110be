"""Hashes in all their forms, and the stored ones put to the test."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from sdops.errors import SdopsError
from sdops.verbs.hash import hash_files

EMPTY = hashlib.sha256(b"").hexdigest()
BIG = {"a": ("F32", np.arange(300_000, dtype=np.float32)), "b": ("F16", np.ones(8, np.float16))}


def tensor_digest(path) -> str:
    raw = path.read_bytes()
    return hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()


def test_all_forms(write):
    path = write("m.safetensors", BIG)
    whole, tensors = hashlib.sha256(path.read_bytes()).hexdigest(), tensor_digest(path)
    report = hash_files(path)
    assert report.data["files"] == [
        {
            "file": str(path),
            "bytes": path.stat().st_size,
            "sha256": whole,
            "AutoV1": hashlib.sha256(path.read_bytes()[0x100000:0x110000]).hexdigest()[:8],
            "AutoV2": whole[:10],
            "AutoV3": tensors[:12],
            "tensors_sha256": tensors,
            "modelspec.hash_sha256": f"0x{tensors}",
        }
    ]
    assert report.result == [f"{whole}  {path}"]
    assert not report.failed


def test_other_files_have_the_hashes_of_files_only(tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(b"PK\x03\x04 something")
    (data,) = hash_files(path, verify=True).data["files"]
    assert data["tensors_sha256"] is None
    assert data["stored"] == {}


def test_metadata_change_the_hash_of_the_file_but_not_of_the_tensors(write):
    one, two = write("1.safetensors", BIG), write("2.safetensors", BIG, {"title": "x"})
    first, second = hash_files(one, two).data["files"]
    assert first["sha256"] != second["sha256"]
    assert first["AutoV3"] == second["AutoV3"]


@pytest.mark.parametrize(
    ("key", "stored", "state", "failed"),
    [
        ("sshs_model_hash", "{true}", "ok", False),
        ("sshs_model_hash", "0x{upper}", "ok", False),
        ("sshs_model_hash", "{true:.12}", "ok", False),
        ("sshs_model_hash", EMPTY, "empty", True),
        ("sshs_model_hash", EMPTY[:12], "empty", True),
        ("sshs_model_hash", "0" * 64, "differs", True),
        ("sshs_model_hash", "", "differs", True),
        ("modelspec.hash_sha256", "0x{true}", "ok", False),
        ("modelspec.hash_sha256", "0x{wrong}", "differs", True),
    ],
)
def test_stored_hashes(key, stored, state, failed, write):
    true = tensor_digest(write("plain.safetensors", BIG))
    stored = stored.format(true=true, upper=true.upper(), wrong=true[::-1])
    path = write("m.safetensors", BIG, {key: stored, "ss_epoch": "1"})
    report = hash_files(path, verify=True)
    assert report.data["files"][0]["stored"][key]["state"] == state
    assert report.failed is failed


def test_verifying_says_that_there_is_nothing_to_compare(write):
    assert "no hashes" in str(hash_files(write("m.safetensors", BIG), verify=True).sections)


def test_the_trainers_legacy_hash_is_of_the_file_with_training_metadata_only(write):
    """Trainers hash a serialisation that has the `ss_*` metadata and not yet the hashes themselves."""
    training = {"ss_epoch": "10", "ss_title": '日本 \x01 "quoted"'}
    before = write("before.safetensors", BIG, training)
    legacy = hashlib.sha256(before.read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    path = write("after.safetensors", BIG, {**training, "sshs_legacy_hash": legacy, "modelspec.title": "x" * 1000})
    assert hash_files(path).data["files"][0]["AutoV1"] != legacy
    (data,) = hash_files(path, verify=True).data["files"]
    assert data["stored"]["sshs_legacy_hash"] == {"value": legacy, "state": "ok"}


def test_the_legacy_hash_of_a_small_file_is_rightly_that_of_nothing(write):
    path = write("m.safetensors", {"a": ("F32", np.zeros(3, "f4"))}, {"sshs_legacy_hash": EMPTY[:8]})
    assert hash_files(path, verify=True).data["files"][0]["stored"]["sshs_legacy_hash"]["state"] == "ok"


def test_verifying_reads_the_file_even_if_its_hash_is_remembered(write, monkeypatch):
    from sdops.core.hashing import fingerprint, remember

    path = write("m.safetensors", BIG)
    remember(path, fingerprint(path), "0" * 64)
    assert hash_files(path, verify=True).data["files"][0]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_one_unreadable_file_does_not_stop_the_others(write, tmp_path):
    path = write("m.safetensors", BIG)
    report = hash_files(tmp_path / "absent", path)
    assert ["error" in data for data in report.data["files"]] == [True, False]
    assert report.failed
    with pytest.raises(SdopsError, match="absent"):
        hash_files(tmp_path / "absent")


def test_no_file_is_wrong_usage():
    with pytest.raises(SdopsError, match="needs at least one file"):
        hash_files()


def test_the_data_are_json(write):
    assert json.loads(json.dumps(hash_files(write("m.safetensors", BIG)).as_dict()))["schema"] == 1
