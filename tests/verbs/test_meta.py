"""Metadata shown and changed: only they change, hashes in the file stay true, bad values are refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from sdops.errors import ChangedError, FormatError, OutputError, UsageError
from sdops.formats import open_source
from sdops.verbs.hash import hash_files
from sdops.verbs.meta import meta
from tests import tiny

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


@pytest.fixture
def path(tmp_path) -> Path:
    metadata = {"format": "pt", "ss_tag_frequency": '{"1_me": {"my name": 3}}', "ss_network_dim": "8", "note": "x" * 99}
    return tiny.write(tmp_path / "m.safetensors", tiny.checkpoint(1), metadata)


def data(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_showing_changes_nothing(path):
    before = path.read_bytes()
    report = meta(path)
    assert report.data["metadata"] == tiny.metadata_of(path)
    assert report.data["private"] == {"ss_tag_frequency": "folders and tags of the training data"}
    assert report.hints == [f"`sdops meta {path} --strip-training` removes it"]
    assert path.read_bytes() == before


def test_what_fits_is_written_in_place(path):
    before, size, inode = data(path), path.stat().st_size, path.stat().st_ino
    report = meta(path, set_={"title": "Mine"}, unset=["note"])
    assert report.data["how"] == "in place"
    assert tiny.metadata_of(path)["modelspec.title"] == "Mine"
    assert "note" not in tiny.metadata_of(path)
    assert (data(path), path.stat().st_size, path.stat().st_ino) == (before, size, inode)


def test_what_does_not_fit_makes_a_new_file_with_room(path):
    before = data(path)
    os.chmod(path, 0o640)
    report = meta(path, set_={"description": "y" * 9000})
    assert report.data["how"].startswith("rewritten")
    assert data(path) == before
    assert path.stat().st_mode & 0o777 == 0o640
    assert meta(path, set_={"title": "z" * 3000}).data["how"] == "in place"
    assert data(path) == before
    assert tiny.metadata_of(path)["modelspec.description"] == "y" * 9000


def test_modelspec_is_completed_from_the_tensors(path):
    lacking = ["ModelSpec asks for `title`, `resolution` as well"]
    assert meta(path, set_={"author": "me"}).warnings == meta(path).warnings == lacking
    found = tiny.metadata_of(path)
    assert found["modelspec.sai_model_spec"] == "1.0.1"
    assert found["modelspec.architecture"] == "stable-diffusion-v1"
    assert found["modelspec.implementation"] == "sgm"
    assert meta(path, set_={"title": "Mine", "resolution": "512x512"}).warnings == []


def test_modelspec_of_a_lora_names_what_it_is_for(tmp_path):
    up, down = ("F16", np.ones((320, 4), "f2")), ("F16", np.ones((4, 768), "f2"))
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    path = tiny.write(tmp_path / "l.safetensors", {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down})
    report = meta(path, set_={"trigger_phrase": "sks"})
    assert tiny.metadata_of(path)["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert tiny.metadata_of(path)["modelspec.implementation"] == "diffusers"
    assert report.warnings == ["ModelSpec asks for `title` as well"]
    assert "modelspec.sai_model_spec" not in meta(path, strip=["modelspec.*"]).data["metadata"]


def test_stripping_adds_nothing(tmp_path):
    path = tiny.write(tmp_path / "m.safetensors", tiny.checkpoint(1), {"modelspec.title": "x", "workflow": "{}"})
    assert meta(path, strip_workflow=True).data["metadata"] == {"modelspec.title": "x"}


def test_an_architecture_that_is_not_that_of_the_tensors_is_told(path):
    warning, _lacking = meta(path, set_={"architecture": "stable-diffusion-xl-v1-base"}).warnings
    assert "the tensors look like `stable-diffusion-v1`" in warning


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resolution", "1024"),
        ("date", "yesterday"),
        ("prediction_type", "x0"),
        ("timestep_range", "0"),
        ("hash_sha256", "abc"),
        ("modelspec.titel", "x"),
        ("modelspec.hash_md5", "0x" + "0" * 32),
        ("title", "  "),
        ("modelspec.is_negative_embedding", "maybe"),
        ("encoder_layer", "two"),
        ("thumbnail", "cover.png"),
    ],
)
def test_bad_values_are_refused(path, key, value):
    before = path.read_bytes()
    with pytest.raises(UsageError) as caught:
        meta(path, set_={key: value})
    assert caught.value.hint
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resolution", "1024x1024"),
        ("date", "2026-11-20"),
        ("date", "2026-11-20T18:30:00+01:00"),
        ("trigger_phrase", ""),
    ],
)
def test_good_values_are_written(path, key, value):
    meta(path, set_={key: value})
    assert tiny.metadata_of(path)[f"modelspec.{key}"] == value


@pytest.mark.parametrize(("key", "false"), [("modelspec.hash_sha256", "0x" + "0" * 64), ("sshs_model_hash", "0" * 64)])
def test_the_stored_hash_must_be_true(path, key, false):
    with pytest.raises(UsageError, match="is not the `" + key) as caught:
        meta(path, set_={key: false})
    true = hashlib.sha256(data(path)).hexdigest()
    assert caught.value.hint.endswith(true)
    meta(path, set_={key: false[:-64] + true})
    assert tiny.metadata_of(path)[key] == false[:-64] + true


def test_the_legacy_hash_must_be_true(tmp_path):
    large = {"w": ("F16", np.arange(700_000, dtype=np.float16))}
    path = tiny.write(tmp_path / "l.safetensors", large, {"ss_note": "a" * 50})
    with pytest.raises(UsageError, match="is not the `sshs_legacy_hash`") as caught:
        meta(path, set_={"sshs_legacy_hash": "00000000"})
    meta(path, set_={"sshs_legacy_hash": caught.value.hint.removeprefix("it is ")})
    assert hash_files(path, verify=True).data["files"][0]["stored"]["sshs_legacy_hash"]["state"] == "ok"


def test_hashes_of_the_tensors_stay_and_those_of_training_are_renewed(tmp_path):
    metadata = {"ss_note": "a" * 50, "sshs_legacy_hash": "00000000"}
    large = {"w": ("F16", np.arange(700_000, dtype=np.float16))}
    path = tiny.write(tmp_path / "l.safetensors", large, metadata)
    hashes = hash_files(path).data["files"][0]["AutoV3"]
    report = meta(path, unset=["ss_note"])
    assert report.warnings == ["updated `sshs_legacy_hash`: it depends on the `ss_` keys"]
    assert hash_files(path).data["files"][0]["AutoV3"] == hashes
    stored = hash_files(path, verify=True).data["files"][0]["stored"]
    assert stored["sshs_legacy_hash"]["state"] == "ok"
    assert meta(path, set_={"other": "x"}).warnings == []


def test_strip_training_keeps_what_is_needed_to_use_the_file(path):
    meta(path, strip_training=True)
    assert set(tiny.metadata_of(path)) == {"format", "ss_network_dim", "note"}


def test_strip_patterns_and_workflows(path):
    meta(path, set_={"prompt": "{}", "workflow": "{}", "other": "D:" + "/models/x".replace("/", chr(92))})
    assert set(meta(path).data["private"]) == {"prompt", "workflow", "other", "ss_tag_frequency"}
    meta(path, strip=["ss_*"], strip_workflow=True)
    assert set(tiny.metadata_of(path)) == {"format", "note", "other"}


def test_unset_of_what_is_not_there(path):
    with pytest.raises(UsageError, match="no `nota`") as caught:
        meta(path, unset=["nota"])
    assert caught.value.hint == "did you mean `note`?"


def test_json_goes_round(path, tmp_path):
    document = tmp_path / "meta.json"
    printed = meta(path).as_dict()
    printed["metadata"] |= {"title": "From JSON", "note": None, "numbers": [1, 2]}
    document.write_text(json.dumps(printed))
    meta(path, from_json=document)
    found = tiny.metadata_of(path)
    assert found["modelspec.title"] == "From JSON"
    assert found["numbers"] == "[1,2]"
    assert "note" not in found
    document.write_text('{"title": "Plain"}')
    meta(path, from_json=document, set_={"author": "me"})
    assert tiny.metadata_of(path)["modelspec.title"] == "Plain"


@pytest.mark.parametrize("text", ["[1]", "{", '"x"', '{"verb": "meta"}'])
def test_other_json_is_refused(path, tmp_path, text):
    document = tmp_path / "meta.json"
    document.write_text(text)
    with pytest.raises(UsageError):
        meta(path, from_json=document)


def test_a_thumbnail_is_put_in_and_shown_as_an_image(path, tmp_path):
    image = tmp_path / "cover.png"
    image.write_bytes(PNG)
    meta(path, thumbnail=image)
    assert tiny.metadata_of(path)["modelspec.thumbnail"].startswith("data:image/png;base64,iVBORw0K")
    assert "image/png, 108 B" in meta(path).text()
    image.write_bytes(b"text")
    with pytest.raises(UsageError, match="is no JPEG"):
        meta(path, thumbnail=image)


def test_an_output_of_its_own(path, tmp_path):
    before = path.read_bytes()
    meta(path, set_={"title": "x"}, output=tmp_path / "o.safetensors")
    assert path.read_bytes() == before
    assert data(tmp_path / "o.safetensors") == data(path)
    with pytest.raises(OutputError):
        meta(path, set_={"title": "x"}, output=tmp_path / "o.safetensors")
    with pytest.raises(OutputError, match="is the input"):
        meta(path, set_={"title": "x"}, output=path, force=True)


@pytest.mark.parametrize("text", ["x", "y" * 9000])
def test_a_dry_run_writes_nothing(path, text):
    before = path.read_bytes()
    report = meta(path, set_={"title": text}, dry_run=True)
    assert report.data["added"][0] == "modelspec.title"
    assert path.read_bytes() == before
    assert os.listdir(path.parent).count(path.name) == 1


def test_odd_headers_keep_what_they_say(tmp_path):
    text = b'{"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3],"own":7},'
    text += b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\x01\x02\x03")
    assert meta(path, set_={"k": "v" * 10}).data["how"].startswith("rewritten")
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header) == ["__metadata__", "b", "a"]
    assert header["b"]["own"] == 7
    assert data(path) == b"\x01\x02\x03"


def test_other_formats_are_shown_and_not_changed(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "m.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(2)}}, path)
    meta(path)
    with pytest.raises(FormatError, match="not a safetensors file"):
        meta(path, set_={"title": "x"})


def test_the_cache_of_the_hub_is_left_alone(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OutputError, match="cache of the Hugging Face Hub"):
        meta(path, set_={"title": "x"})
    meta(path, set_={"title": "x"}, output=tmp_path / "copy.safetensors")


def test_a_file_that_changes_meanwhile_is_left_alone(path, monkeypatch):
    from sdops.core import sink_header

    real = sink_header.replace_header

    def late(target, old, new):
        path.write_bytes(path.read_bytes().replace(b"my name", b"MY NAME"))
        real(target, old, new)

    monkeypatch.setattr(sink_header, "replace_header", late)
    with pytest.raises(ChangedError):
        meta(path, unset=["note"])
    assert b"MY NAME" in path.read_bytes()


def test_a_half_written_header_is_restored_first(path):
    from sdops.core import sink_header

    old = path.read_bytes()[: 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    new = old.replace(b"my name", b"MY NAME").replace(b"xxx", b"zzz")
    sink_header._write_journal(path, path.stat().st_size, old, new)
    with open(path, "r+b") as file:
        file.write(new[: new.index(b"MY NAME") + 7])
    report = meta(path)
    assert "was cut short" in report.warnings[0]
    assert path.read_bytes()[: len(old)] == old


def test_others_say_how_a_half_written_header_is_restored(path):
    from sdops.core import sink_header

    old = path.read_bytes()[: 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    new = old[:8] + b" " + old[8:-1]  # the half of it that was written has lost its brace
    sink_header._write_journal(path, path.stat().st_size, old, new)
    with open(path, "r+b") as file:
        file.write(new[:9])
    with pytest.raises(FormatError) as caught:
        open_source(path)
    assert "`sdops meta " in caught.value.hint
    assert "was cut short" in meta(path).warnings[0]
    open_source(path).close()
