"""Models in several files: indexes, shards, diffusers folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdops.core.source import read
from sdops.errors import FormatError, SdopsError
from sdops.formats import open_source
from sdops.formats.diffusers import DiffusersFolder
from tests.formats.writers import raw_bytes, sample, write_shards


def keys(path: Path) -> set[str]:
    source = open_source(path)
    source.close()
    return set(source.specs)


# Shards


@pytest.mark.parametrize("variant", ["", "fp16"])
@pytest.mark.parametrize("index", [True, False])
def test_any_file_of_the_set_means_the_model(tmp_path, variant, index):
    write_shards(tmp_path, sample(), variant=variant, index=index)
    for path in sorted(tmp_path.iterdir()):
        source = open_source(path)
        assert {key: read(source, key) for key in source.specs} == {k: raw_bytes(t) for k, t in sample().items()}
        assert [file.name[-24:] for file in source.files] == ["00001-of-00002.safetensors"[-24:],
                                                              "00002-of-00002.safetensors"[-24:]]  # fmt: skip
        source.close()


def test_reads_file_after_file(tmp_path):
    """Specs come in the order of the disk."""
    source = open_source(write_shards(tmp_path, sample()))
    order = [source.places[key][0].name for key in source.specs]
    assert order == sorted(order)
    for part in {id(place[0]): place[0] for place in source.places.values()}.values():
        own = [key for key in source.specs if source.places[key][0] is part]
        assert own == list(part.specs)
    source.close()


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(tmp_path, index):
    path = write_shards(tmp_path, sample(), index=index)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match=r"1 file missing beside it: `model-00002-of-00002.safetensors`"):
        open_source(path)


def test_a_damaged_shard_is_named(tmp_path):
    path = write_shards(tmp_path, sample())
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(FormatError, match=r"model-00002-of-00002.safetensors` is a Git LFS pointer"):
        open_source(path)


def change(path: Path, **weight_map: Any) -> None:
    index = json.loads(path.read_text())
    index["weight_map"] |= weight_map
    path.write_text(json.dumps(index))


EVIL = [
    "../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", ".", "",
    "x\0.safetensors", "https://x/y.safetensors", "C:x.safetensors", "x.txt", ".hidden.safetensors", 3, None,
    ["x.safetensors"], "\x1b[31mx.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", EVIL)
def test_an_index_cannot_reach_elsewhere(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"conv.bias": torch.ones(3)}, tmp_path / "secret.safetensors")
    path = write_shards(folder, sample())
    change(path, **{"conv.bias": name})
    with pytest.raises(FormatError, match="no plain file name"):
        open_source(path)


def test_every_listed_tensor_must_be_there(tmp_path):
    path = write_shards(tmp_path, sample())
    change(path, gone="model-00001-of-00002.safetensors")
    with pytest.raises(FormatError, match="`gone` is not in `model-00001"):
        open_source(path)


def test_the_index_decides_and_says_so(tmp_path):
    path = write_shards(tmp_path, {"a": torch.ones(2), "b": torch.zeros(3)})
    save_file(
        {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors"
    )
    source = open_source(path)
    assert set(source.specs) == {"a", "b"}
    assert read(source, "b") == raw_bytes(torch.zeros(3))
    assert any("1 tensor not listed" in warning for warning in source.warnings)
    assert any("1 tensor in two files" in warning for warning in source.warnings)
    source.close()


def test_without_an_index_two_tensors_of_one_name_are_an_error(tmp_path):
    path = write_shards(tmp_path, {"a": torch.ones(2), "b": torch.zeros(3)}, index=False)
    save_file({"a": torch.ones(2)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(FormatError, match="`a` is in two of the files"):
        open_source(path)


INDEXES = [
    "{}",
    '{"weight_map": {}}',
    '{"weight_map": []}',
    '{"weight_map": {"a": "x.bin", "a": "y.bin"}}',
    "{",
    '{"a": NaN}',
]


@pytest.mark.parametrize("text", INDEXES)
def test_damaged_indexes(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=r"index\.json"):
        open_source(path)


def test_an_endless_count_costs_nothing(tmp_path):
    path = tmp_path / "model-1-of-99999.safetensors"
    save_file(sample(), path)
    with pytest.raises(FormatError, match="99,998 files missing"):
        open_source(path)


def test_bin_shards(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.ones(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    assert keys(tmp_path / "pytorch_model-00001-of-00002.bin") == {"a", "b"}


# Diffusers folders


def component(folder: Path, *files: str, config: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    """A component's folder; each file holds one tensor, called as the file, and `tensors`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"_class_name": "Thing"}))
    for name in files:
        content = {name: torch.ones(2)} | tensors
        save_file(content, folder / name) if name.endswith("safetensors") else torch.save(content, folder / name)
    return folder


def pipeline(folder: Path) -> Path:
    component(folder / "unet", "diffusion_pytorch_model.safetensors", config={"_class_name": "UNet2DConditionModel"})
    component(folder / "vae", "diffusion_pytorch_model.bin", config={"_class_name": "AutoencoderKL"})
    component(folder / "text_encoder", "model.safetensors", config={"architectures": ["CLIPTextModel"]})
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    listed = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": True,
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(listed))
    return folder


def test_a_pipeline(tmp_path):
    source = open_source(pipeline(tmp_path / "sd"))
    assert isinstance(source, DiffusersFolder)
    assert set(source.specs) == {
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin", "text_encoder/model.safetensors",
    }  # fmt: skip
    assert {name: part.class_name for name, part in source.components.items()} == {
        "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
    }  # fmt: skip
    assert [file.parent.name for file in source.files] == [
        source.components[name].folder.name for name in source.components
    ]
    assert read(source, "vae/diffusion_pytorch_model.bin") == raw_bytes(torch.ones(2))
    assert source.warnings == []
    source.close()


def test_missing_parts_are_told(tmp_path):
    folder = pipeline(tmp_path / "sd")
    (folder / "vae" / "diffusion_pytorch_model.bin").unlink()
    (folder / "scheduler" / "scheduler_config.json").unlink()
    (folder / "scheduler").rmdir()
    source = open_source(folder)
    source.close()
    assert set(source.components) == {"unet", "text_encoder"}
    assert any("`scheduler`, whose folder is missing" in warning for warning in source.warnings)
    assert any("vae` has no weights" in warning for warning in source.warnings)


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["pytorch_model.bin"], "pytorch_model.bin"),
        (["model.safetensors", "model.fp16.safetensors"], "model.safetensors"),
        (["model.fp16.safetensors", "pytorch_model.bin"], "model.fp16.safetensors"),
        (["model.bf16.safetensors", "model.fp16.safetensors"], "model.fp16.safetensors"),
        (["model.non_ema.safetensors"], "model.non_ema.safetensors"),
        (["diffusion_pytorch_model.safetensors", "other.safetensors"], "diffusion_pytorch_model.safetensors"),
    ],
)
def test_which_weights_are_taken(tmp_path, files, taken):
    assert keys(component(tmp_path / "part", *files)) == {taken}


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("variant", ["", "fp16"])
def test_sharded_components(tmp_path, variant, index):
    folder = component(tmp_path / "unet")
    write_shards(folder, sample(), stem="diffusion_pytorch_model", variant=variant, index=index)
    source = open_source(folder)
    assert {key: read(source, key) for key in source.specs} == {k: raw_bytes(t) for k, t in sample().items()}
    assert len(source.components[""].files) == 2
    source.close()


@pytest.mark.parametrize("name", ["../outside", "a/b", "..", "", "a\0b", "a\\b"])
def test_component_names_cannot_reach_elsewhere(tmp_path, name):
    folder = pipeline(tmp_path / "sd")
    (folder / "model_index.json").write_text(json.dumps({name: ["diffusers", "X"], "unet": ["diffusers", "Y"]}))
    with pytest.raises(FormatError, match="no plain folder name"):
        open_source(folder)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(FormatError, match="is a folder, but not one that diffusers saved"):
        open_source(tmp_path)
    save_file(sample(), tmp_path / "dream.safetensors")
    with pytest.raises(FormatError, match="it contains 1 model file") as caught:
        open_source(tmp_path)
    assert "dream.safetensors" in caught.value.hint
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="not one that diffusers saved with weights"):
        open_source(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(FormatError, match=r"model_index.json` is damaged"):
        open_source(tmp_path)


def test_config_that_is_no_json(tmp_path):
    folder = component(tmp_path / "unet", "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text("<html>")
    with pytest.raises(SdopsError, match=r"config.json` is damaged"):
        open_source(folder)
