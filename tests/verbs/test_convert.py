"""Conversions between layouts: the folder and back, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest

import sdops
from fixtures import make
from sdops.formats import open_source
from tests import tiny

EXACT = [
    "sd15", "sd15-ema", "sd15-inpainting", "sd21", "sdxl", "refiner", "sd3-medium", "sd3-medium-comfy-allinone",
    "sd35-medium", "sd35-large", "flux1-dev", "flux1-dev-comfy-allinone", "chroma", "z-image", "qwen-image",
    "flux2-klein4b-bfl-transformer", "wan21-t2v-1.3b-native-transformer", "controlnet-sd15-ldm", "flux-ae-ldm",
]  # fmt: skip
PIPELINES = {
    "sd15": "sd15-diffusers",
    "sd21": "sd21-diffusers",
    "sdxl": "sdxl-base-diffusers",
    "refiner": "sdxl-refiner-diffusers",
}


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def everything(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    source = open_source(folder)
    source.close()
    return {key: (spec.dtype, spec.shape) for key, spec in source.specs.items()}


@pytest.mark.parametrize("name", EXACT)
def test_a_folder_becomes_the_same_file_again(small_checkpoint, tmp_path, name):
    file = small_checkpoint(name)
    there = sdops.convert(file, to="diffusers", output=tmp_path / "folder")
    back = sdops.convert(tmp_path / "folder", to="original", output=tmp_path / "back.safetensors")
    assert digest(tmp_path / "back.safetensors") == digest(file)
    assert back.data["exact_header"]
    assert there.data["dropped"] == back.data["dropped"] == {}
    assert there.data["tensors"]["set_aside"] == back.data["tensors"]["returned"]
    assert there.data["tensors"]["cast"] == 0


@pytest.mark.parametrize(("name", "pipeline"), PIPELINES.items())
def test_the_folder_has_what_the_published_one_has(small_checkpoint, tmp_path, name, pipeline):
    sdops.convert(small_checkpoint(name), to="diffusers", output=tmp_path / "folder")
    wanted = make.shrunk(make.specs(pipeline))
    found = everything(tmp_path / "folder")
    assert found.keys() == wanted.keys()
    assert {key: len(shape) for key, (_, shape) in found.items()} == {
        key: len(shape) for key, (_, shape) in wanted.items()
    }


@pytest.mark.parametrize("name", ["sd15", "sdxl", "refiner", "sd3-medium"])
def test_the_folder_can_be_read_without_sdops(small_checkpoint, tmp_path, name):
    folder = tmp_path / "folder"
    sdops.convert(small_checkpoint(name), to="diffusers", output=folder)
    index = json.loads((folder / "model_index.json").read_text())
    for part, entry in index.items():
        if isinstance(entry, list) and entry != [None, None]:
            files = {path.name for path in (folder / part).iterdir()}
            assert files & {"config.json", "scheduler_config.json", "vocab.json"}, part
    assert {"sdops_extra.safetensors", "model_index.json"} == {path.name for path in folder.iterdir() if path.is_file()}
    width = json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"][-1]
    assert tiny.load(folder / "vae" / "diffusion_pytorch_model.safetensors")["encoder.conv_in.weight"][1].shape[0] <= (
        width
    )


def test_any_header_comes_back(small_checkpoint, tmp_path):
    """Order, spaces, unusual shapes and metadata of the file are kept, whoever wrote it."""
    tensors = tiny.load(small_checkpoint("sd15"))
    keys = sorted(tensors, key=lambda key: sha256(key.encode()).digest())
    header, data = {"__metadata__": {"modelspec.title": "Ä", "sshs_model_hash": "0"}}, b""
    for key in keys:
        dtype, array = tensors[key]
        shape = list(array.shape)
        if key.endswith("attn_1.q.weight"):
            shape = shape[:2]  # some files have it as a matrix
        raw = array.tobytes()
        header[key] = {"shape": shape, "data_offsets": [len(data), len(data) + len(raw)], "dtype": dtype}
        data += raw
    text = json.dumps(header, indent=1).encode()
    file = tmp_path / "odd.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    sdops.convert(file, to="diffusers", output=tmp_path / "folder")
    sdops.convert(tmp_path / "folder", to="original", output=tmp_path / "back.safetensors")
    assert digest(tmp_path / "back.safetensors") == digest(file)


def test_a_trained_folder_keeps_the_header(small_checkpoint, tmp_path):
    """New values, old order and metadata."""
    file = small_checkpoint("sd15")
    sdops.convert(file, to="diffusers", output=tmp_path / "folder")
    weights = tmp_path / "folder" / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2:] = b"\0\0" if data[-2:] != b"\0\0" else b"\0\x3c"
    weights.write_bytes(data)
    report = sdops.convert(tmp_path / "folder", to="original", output=tmp_path / "back.safetensors")
    assert report.data["exact_header"]
    old, new = tiny.load(file), tiny.load(tmp_path / "back.safetensors")
    assert list(old) == list(new)
    changed = [key for key in old if not tiny.same(old[key], new[key])]
    assert len(changed) == 1
    assert changed[0].startswith("first_stage_model.")


def test_another_folder_becomes_an_ordinary_file(small_checkpoint, tmp_path):
    """What sdops did not write has no side file: names and prefixes are those of the family."""
    for name, pipeline in PIPELINES.items():
        output = tmp_path / f"{name}.safetensors"
        report = sdops.convert(small_checkpoint(pipeline), to="original", output=output)
        found, wanted = tiny.load(output), make.shrunk(make.specs(name))
        missing = wanted.keys() - found.keys()
        assert found.keys() <= wanted.keys()
        lost = ("position_ids", "logit_scale", "resblocks.23.", "model.text_projection")
        assert all(any(part in key for part in lost) for key in missing)
        assert {key: array.shape for key, (_, array) in found.items()} == {key: wanted[key][1] for key in found}
        assert report.data["dropped"] == {}
        assert tiny.metadata_of(output) == {"format": "pt"}


def test_a_damaged_side_file_is_told(small_checkpoint, tmp_path):
    sdops.convert(small_checkpoint("controlnet-sd15-ldm"), to="diffusers", output=tmp_path / "folder")
    extra = tmp_path / "folder" / "sdops_extra.safetensors"
    tensors, metadata = tiny.load(extra), tiny.metadata_of(extra)
    for change in ({"header": ("U8", tensors["header"][1][:-5])}, {}):
        tiny.write(extra, tensors | change, metadata if change else {})
        with pytest.raises(sdops.SdopsError, match="damaged") as caught:
            sdops.convert(tmp_path / "folder", to="original", output=tmp_path / "back.safetensors")
        assert "move it away" in (caught.value.hint or "")
    extra.unlink()
    report = sdops.convert(tmp_path / "folder", to="original", output=tmp_path / "back.safetensors")
    assert not report.data["exact_header"]


def test_a_projection_is_invented_and_taken_back(small_checkpoint, tmp_path):
    model = dict(tiny.load(small_checkpoint("sd3-medium")))
    del model["text_encoders.clip_l.transformer.text_projection.weight"]
    file = tiny.write(tmp_path / "m.safetensors", model)
    report = sdops.convert(file, to="diffusers", output=tmp_path / "folder")
    assert list(report.data["invented"]) == ["text_encoder/text_projection.weight"]
    made = tiny.numbers(tiny.load(tmp_path / "folder/text_encoder/model.safetensors")["text_projection.weight"])
    assert (made == 1).sum() == len(made) == made.sum()
    back = sdops.convert(tmp_path / "folder", to="original", output=tmp_path / "back.safetensors")
    assert digest(tmp_path / "back.safetensors") == digest(file)
    assert list(back.data["dropped"]) == ["text_encoder/text_projection.weight"]


FULL = ["sd15", "sd21", "sdxl", "refiner", "sd3-medium", "sd35-medium", "sd35-large", "flux1-dev"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_shapes_come_back(tmp_path, name):
    """Real sizes; all holes, but for bytes all over it that show where they went. Flux takes 25 GB of disk."""
    file, folder, back = tmp_path / "m.safetensors", tmp_path / "folder", tmp_path / "back.safetensors"
    make.full(name, file, sparse=True)
    size = file.stat().st_size
    if shutil.disk_usage(tmp_path).free < 1.1 * size:
        pytest.skip(f"needs {1.1 * size / 1e9:.0f} GB of disk")
    with file.open("r+b") as opened:
        for place in range(size - 1, 2_000_000, -size // 9973):
            opened.seek(place)
            opened.write(os.urandom(1))
    try:
        sdops.convert(file, to="diffusers", output=folder)
        for written in folder.rglob("*.safetensors"):  # nearly all zeros
            subprocess.run(["fallocate", "--dig-holes", written], check=False)
        sdops.convert(folder, to="original", output=back)
        with file.open("rb") as one, back.open("rb") as other:
            while block := one.read(1 << 24):
                assert other.read(1 << 24) == block
            assert not other.read(1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        back.unlink(missing_ok=True)
